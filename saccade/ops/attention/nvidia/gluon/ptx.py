"""Registers of a warp as tensors `[warps, 32]`: one element is one register of one thread.

What Triton's layouts would decide is decided here by hand, so that codes travel from memory into
matrix products without being exchanged between threads.  Thread `4 g + t` of a warp (g below 8, t
below 4) holds, of a product `[16, 16] @ [16, 8]` (PTX ISA, mma.m16n8k16),

    of the left side    row g and row g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9
    of the right side   column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
    of the result       row g and row g + 8, columns 2t, 2t + 1

and since a sum may run in any order, "columns of the left side" may be any four channels or keys
of thread t, as long as both sides agree.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.gpu.triton_lang import LN2, LOG2E

HALF = gl.constexpr("f16")


@triton.constexpr_function
def _load_text(where, words, offset):
    size = "" if words == 1 else f".v{words}"
    found = ", ".join(f"${i}" for i in range(words))
    found = found if words == 1 else f"{{{found}}}"
    return f"ld.{where}{size}.b32 {found}, [${words} + {offset}];"


@triton.constexpr_function
def _load_registers(words, address):
    return "=r," * words + address


@gluon.jit
def _loaded(address, TEXT: gl.constexpr, REGISTERS: gl.constexpr, WORDS: gl.constexpr):
    """The words that an instruction loads, a power of two up to 4."""
    if WORDS == 4:
        found = gl.inline_asm_elementwise(
            TEXT, REGISTERS, [address], (gl.int32, gl.int32, gl.int32, gl.int32), False, 1
        )
    elif WORDS == 2:
        found = gl.inline_asm_elementwise(
            TEXT, REGISTERS, [address], (gl.int32, gl.int32), False, 1
        )
    else:
        found = (gl.inline_asm_elementwise(TEXT, REGISTERS, [address], gl.int32, False, 1),)
    return found


@gluon.jit
def load_words(address, OFFSET: gl.constexpr, WORDS: gl.constexpr):
    """WORDS words (a power of two up to 4) of each thread from its address plus OFFSET bytes."""
    text: gl.constexpr = _load_text("global.nc", WORDS, OFFSET)
    registers: gl.constexpr = _load_registers(WORDS, "l")
    return _loaded(address, text, registers, WORDS)


@triton.constexpr_function
def _bytes_text(selector):
    return f"prmt.b32 $0, $1, $2, {selector};"


@gluon.jit
def pick_bytes(x, y, SELECTOR: gl.constexpr):
    """Four bytes out of x (0 to 3) and y (4 to 7), the lowest named by the last digit."""
    text: gl.constexpr = _bytes_text(SELECTOR)
    return gl.inline_asm_elementwise(text, "=r,r,r", [x, y], gl.int32, True, 1)


@triton.constexpr_function
def _product_text(kind):
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}},"
        " {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.jit
def multiply(left, right, c, KIND: gl.constexpr = HALF):
    """c + left @ right for four, two and four registers; KIND f16 or bf16, float32 out."""
    a0, a1, a2, a3 = left
    b0, b1 = right
    c0, c1, c2, c3 = c
    text: gl.constexpr = _product_text(KIND)
    return gl.inline_asm_elementwise(
        text, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (gl.float32, gl.float32, gl.float32, gl.float32), True, 1,
    )  # fmt: skip


@gluon.jit
def transposed(x):
    """An 8 x 8 matrix of halves, of which thread 4 g + t holds row g, columns 2t, 2t + 1."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], gl.int32, True, 1
    )


@triton.constexpr_function
def _shuffle_text(distance):
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"


@gluon.jit
def from_partner(x, DISTANCE: gl.constexpr):
    """The register of the thread whose number differs by the bit DISTANCE."""
    text: gl.constexpr = _shuffle_text(DISTANCE)
    return gl.inline_asm_elementwise(text, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def max_over_rows(x):
    """Largest of the eight threads with the same t."""
    x = gl.maximum(x, from_partner(x, 4))
    x = gl.maximum(x, from_partner(x, 8))
    return gl.maximum(x, from_partner(x, 16))


@gluon.jit
def sum_over_rows(x):
    """Sum of the eight threads with the same t."""
    x += from_partner(x, 4)
    x += from_partner(x, 8)
    return x + from_partner(x, 16)


@triton.constexpr_function
def _pair_text(kind):
    return f"cvt.rn.{kind}x2.f32 $0, $2, $1;"


@gluon.jit
def pair(low, high, KIND: gl.constexpr):
    """Two float32 numbers as a pair of KIND, f16 or bf16."""
    text: gl.constexpr = _pair_text(KIND)
    return gl.inline_asm_elementwise(text, "=r,f,f", [low, high], gl.int32, True, 1)


@gluon.jit
def halves(low, high):
    """Two float32 numbers as a pair of float16."""
    return pair(low, high, "f16")


@gluon.jit
def times(x, y):
    """Products of two pairs of float16."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], gl.int32, True, 1
    )


@gluon.jit
def from_bfloat16(x):
    """A pair of bfloat16 as a pair of float16."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000;"
        " cvt.rn.f16x2.f32 $0, b, a; }",
        "=r,r",
        [x],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def from_fp8(x, WHICH: gl.constexpr):
    """The lower (0) or upper (1) two e4m3 numbers of a word as a pair of float16."""
    if WHICH == 0:
        text: gl.constexpr = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, a; }"
    else:
        text: gl.constexpr = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, b; }"
    return gl.inline_asm_elementwise(text, "=r,r", [x], gl.int32, True, 1)


@triton.constexpr_function
def _own_text(size):
    return f"{{ .shared .align 128 .b8 own[{size}]; mov.u32 $0, own; }}"


@gluon.jit
def own_memory(thread, SIZE: gl.constexpr):
    """Address of SIZE bytes of shared memory, at most 48 KiB."""
    text: gl.constexpr = _own_text(SIZE)
    return gl.inline_asm_elementwise(text, "=r,r", [thread], gl.int32, True, 1)


@triton.constexpr_function
def _copy_text(to, source):
    return f"cp.async.cg.shared.global [$1 + {to}], [$2 + {source}], 16, $3; mov.u32 $0, 0;"


@gluon.jit
def copy_line(place, address, size, TO: gl.constexpr, FROM: gl.constexpr):
    """Ask for 16 bytes of each thread: from address + FROM to place + TO in shared memory.

    Where `size` is 0 instead of 16 nothing is read, at no cost: zeros are written.
    """
    text: gl.constexpr = _copy_text(TO, FROM)
    gl.inline_asm_elementwise(text, "=r,r,l,r", [place, address, size], gl.int32, False, 1)


@triton.constexpr_function
def _expect_text(size):
    return (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        f" @p cp.async.bulk.prefetch.L2.global [$1], {size}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def expect(address, where, SIZE: gl.constexpr):
    """Have SIZE bytes at `address` brought into the L2 cache by threads whose `where` is not 0."""
    text: gl.constexpr = _expect_text(SIZE)
    args = [address + where.to(gl.int64) * 0, where]
    gl.inline_asm_elementwise(text, "=r,l,r", args, gl.int32, False, 1)


@gluon.jit
def close_copies(thread):
    """What was asked for since the last call is one group."""
    gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [thread], gl.int32, False, 1
    )


@triton.constexpr_function
def _wait_text(groups):
    return f"cp.async.wait_group {groups}; bar.warp.sync -1; mov.u32 $0, 0;"


@gluon.jit
def wait_copies(thread, GROUPS: gl.constexpr):
    """Wait until at most GROUPS groups are on their way, for all threads of a warp."""
    text: gl.constexpr = _wait_text(GROUPS)
    gl.inline_asm_elementwise(text, "=r,r", [thread], gl.int32, False, 1)


@gluon.jit
def meet(thread):
    """Every thread of a warp has read what it wanted."""
    gl.inline_asm_elementwise(
        "bar.warp.sync -1; mov.u32 $0, 0;", "=r,r", [thread], gl.int32, False, 1
    )


@gluon.jit
def read_words(place, OFFSET: gl.constexpr, WORDS: gl.constexpr):
    """WORDS words of each thread from shared memory at its place plus OFFSET bytes."""
    text: gl.constexpr = _load_text("shared", WORDS, OFFSET)
    registers: gl.constexpr = _load_registers(WORDS, "r")
    return _loaded(place, text, registers, WORDS)


@gluon.jit
def clear_line(place, where):
    """Write 16 bytes of zeros to shared memory for each thread whose `where` is not 0."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.s32 p, $2, 0;"
        " @p st.shared.v4.b32 [$1], {z, z, z, z}; mov.b32 $0, z; }",
        "=r,r,r",
        [place, where],
        gl.int32,
        False,
        1,
    )


@triton.constexpr_function
def _store_text(words):
    numbers = ", ".join(f"${i + 3}" for i in range(words))
    return (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        f" @p st.global.v{words}.b32 [$1], {{{numbers}}}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def store_words(address, words, where):
    """Two or four words of each thread whose `where` is not 0, side by side in memory."""
    text: gl.constexpr = _store_text(len(words))
    if len(words) == 4:
        args = [address, where, words[0], words[1], words[2], words[3]]
        gl.inline_asm_elementwise(text, "=r,l,r,r,r,r,r", args, gl.int32, False, 1)
    else:
        args = [address, where, words[0], words[1]]
        gl.inline_asm_elementwise(text, "=r,l,r,r,r", args, gl.int32, False, 1)


@gluon.jit
def as_word(x):
    """The bits of a float32."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,f", [x], gl.int32, True, 1)


@gluon.jit
def bfloat_halves(low, high):
    """Two float32 numbers as a pair of bfloat16."""
    return pair(low, high, "bf16")


@gluon.jit
def ended(top, l, sink_logits, h, own):
    """(lse, what an output has still to shrink by, the sum it is divided by) of query rows.

    Args:
        top, l: largest score, in powers of two, and sum of weights; LOWEST and 0 if none is seen.
        h: query heads; their learned sinks count where `own`, in one split of all.
    """
    shrink = l * 0.0 + 1.0
    if sink_logits is not None:
        sink = gl.load(sink_logits + h, mask=own, other=float("-inf")) * LOG2E
        raised = gl.maximum(top, sink)
        shrink = gl.exp2(top - raised)
        l = l * shrink + gl.exp2(sink - raised)
        top = raised
    safe = gl.where(l == 0, 1.0, l)
    return gl.where(l == 0, float("-inf"), (top + gl.log2(safe)) * LN2), shrink, safe
