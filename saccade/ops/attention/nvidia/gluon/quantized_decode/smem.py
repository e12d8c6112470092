"""How a tile of codes gets from memory into the registers of a warp, and in which order.

A warp asks for 64 keys or values, and their scales and offsets, 16 bytes a thread at a time, and
they wait in its own shared memory.  They lie there as in global memory, except that pieces of a
line change places from row to row, so that the threads of a warp, which read rows 8 (keys) or 16
(values) apart, meet no bank twice.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx import (
    clear_line,
    close_copies,
    copy_line,
    expect,
    from_bfloat16,
    load_words,
    meet,
    read_words,
    times,
)

KEYS = gl.constexpr(64)  # of a tile
NUMBERS = gl.constexpr(512)  # bytes of scales and offsets: a line of each thread


@gluon.jit
def head_address(strided, b, kv_head, SIZE: gl.constexpr):
    """Address of the first row of a head, of elements of SIZE bytes."""
    return (
        strided.ptr.to(gl.int64) + (b * strided.batch + kv_head.to(gl.int64) * strided.head) * SIZE
    )


@gluon.jit
def addresses(coded, b, kv_head):
    """Addresses of a head's codes, scales and offsets."""
    return (
        head_address(coded.qdata, b, kv_head, 1),
        head_address(coded.scale, b, kv_head, 2),
        head_address(coded.offset, b, kv_head, 2),
    )


@gluon.jit
def load_many(address, FIRST: gl.constexpr, STEP: gl.constexpr, COUNT: gl.constexpr,
              WORDS: gl.constexpr):  # fmt: skip
    """WORDS words at each of COUNT places STEP bytes apart, in order."""
    found = load_words(address, FIRST, WORDS)
    for i in gl.static_range(1, COUNT):
        found += load_words(address, FIRST + i * STEP, WORDS)
    return found


@gluon.jit
def load_channels(address, D: gl.constexpr):
    """Float16 numbers of a thread's channels, D / 8 of each half, in pairs."""
    HALF: gl.constexpr = D  # bytes
    COUNT: gl.constexpr = D // 64
    return load_many(address, 0, 16, COUNT, 4) + load_many(address, HALF, 16, COUNT, 4)


@gluon.jit
def load_queries(address, D: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of float16 of a thread's channels of its query row, those of int4's upper half / 16.

    The upper four bits of a byte are read as sixteen times the code.
    """
    words = load_channels(address, D)
    found = ()
    for i in gl.static_range(D // 8):
        word = from_bfloat16(words[i]) if DTYPE == gl.bfloat16 else words[i]
        if FORMAT == "int4" and i >= D // 16:
            word = times(word, gl.full(word.shape, 0x2C002C00, gl.int32, word.type.layout))
        found += (word,)
    return found


@gluon.jit
def copy_keys(place, address, thread, size, ROW: gl.constexpr):
    """Ask for the codes of 64 keys, 512 bytes at a time; every other 8 rows swap 64-byte halves."""
    for n in gl.static_range(ROW // 8):
        if ROW >= 64:
            turned = (thread * 16) ^ (64 * ((64 * n // ROW) % 2))
        else:
            turned = (thread * 16) ^ (64 * (thread // 16))
        copy_line(place + turned, address + thread * 16, size, 512 * n, 512 * n)


@gluon.jit
def copy_values(place, address, thread, size, ROW: gl.constexpr):
    """The same for values; 32-byte quarters change places by groups of 16 rows."""
    for n in gl.static_range(ROW // 8):
        turned = (thread * 16) ^ (32 * ((32 * n // ROW) % 4))
        copy_line(place + turned, address + thread * 16, size, 512 * n, 512 * n)


@gluon.jit
def copy_numbers(place, scale, offset, thread, size, SIZE: gl.constexpr):
    """Ask for SIZE bytes of scales and as many of offsets, which lie behind them.

    Threads that are left over bring the same lines to places of their own, which nobody reads.
    """
    EACH: gl.constexpr = SIZE // 16  # threads for each
    who = thread % EACH
    address = gl.where(thread % (2 * EACH) < EACH, scale, offset) + who * 16
    copy_line(place + thread * 16, address, size, 0, 0)


@gluon.jit
def ask_for_keys(place, numbers, source, tile, thread, size, ROW: gl.constexpr,
                 GROUP: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Ask for codes, scales and offsets of a tile of keys: one group of copies."""
    qdata, scale, offset = source
    tile = tile.to(gl.int64)
    group = tile * KEYS // GROUP * (2 * D)
    copy_keys(place, qdata + tile * (KEYS * ROW), thread, size, ROW)
    copy_numbers(numbers, scale + group, offset + group, thread, size, 2 * D)
    close_copies(thread)


@gluon.jit
def ask_for_values(place, numbers, source, tile, thread, size, ROW: gl.constexpr,
                   V_GROUPS: gl.constexpr):  # fmt: skip
    """The same for a tile of values."""
    qdata, scale, offset = source
    tile = tile.to(gl.int64)
    copy_values(place, qdata + tile * (KEYS * ROW), thread, size, ROW)
    at = tile * (2 * KEYS * V_GROUPS)
    copy_numbers(numbers, scale + at, offset + at, thread, size, 2 * KEYS * V_GROUPS)
    close_copies(thread)


@gluon.jit
def expect_tile(k_from, v_from, tile, thread, there, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
                K_GROUP: gl.constexpr, V_GROUPS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Have a tile that is `there` brought into the L2 cache, before it is certain what it holds.

    Kernels that still write reach memory through the same cache, so nothing old is ever read.
    """
    where = gl.where((thread == 0) & there, 1, 0)
    tile = tile.to(gl.int64)
    group = tile * KEYS // K_GROUP * (2 * D)
    at = tile * (2 * KEYS * V_GROUPS)
    expect(k_from[0] + tile * (KEYS * K_ROW), where, KEYS * K_ROW)
    expect(v_from[0] + tile * (KEYS * V_ROW), where, KEYS * V_ROW)
    for i in gl.static_range(1, 3):
        expect(k_from[i] + group, where, 2 * D)
        expect(v_from[i] + at, where, 2 * KEYS * V_GROUPS)


@gluon.jit
def clear_values(place, thread, real, ROW: gl.constexpr):
    """Codes of values from row `real` of a tile on become 0: fp8 codes there might be nan."""
    for half in gl.static_range(2):
        row = thread + 32 * half
        for n in gl.static_range(ROW // 16):
            at = (row * ROW + 16 * n) ^ (32 * (row // 16 % 4))
            clear_line(place + at, (row >= real).to(gl.int32))
    meet(thread)


@gluon.jit
def read_codes(place, AT: gl.constexpr, TURN: gl.constexpr, WORDS: gl.constexpr):
    """Words at AT of what the copies have laid down with some of the bits TURN exchanged."""
    return read_words(place ^ (AT & TURN), AT - (AT & TURN), WORDS)


@gluon.jit
def read_keys(place, ROW: gl.constexpr, D: gl.constexpr):
    """D / 32 words of both halves of eight keys: [key][half][word], or [key][word] for int4."""
    found = ()
    for key in gl.static_range(8):
        for half in gl.static_range(2 if ROW == D else 1):
            found += read_codes(place, key * ROW + half * (D // 2), 64, D // 32)
    return found


@gluon.jit
def read_values(place, ROW: gl.constexpr, D: gl.constexpr):
    """D / 64 words of both halves of sixteen values, in the same order."""
    found = ()
    for key in gl.static_range(16):
        for half in gl.static_range(2 if ROW == D else 1):
            found += read_codes(place, key * ROW + half * (D // 2), 96, D // 64)
    return found


@gluon.jit
def read_channels(place, D: gl.constexpr):
    """Float16 numbers of a thread's channels, D / 8 of each half, in pairs."""
    found = read_words(place, 0, 4)
    if D == 128:
        found += read_words(place, 16, 4)
    found += read_words(place, D, 4)
    if D == 128:
        found += read_words(place, D + 16, 4)
    return found


@gluon.jit
def read_tokens(place, V_GROUPS: gl.constexpr):
    """Float16 numbers of a thread's sixteen values, in pairs: two values, or a value's groups."""
    found = read_words(place, 0, 4) + read_words(place, 16, 4)
    if V_GROUPS == 2:
        found += read_words(place, 32, 4)
        found += read_words(place, 48, 4)
    return found
