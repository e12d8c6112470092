"""Decoding over quantised keys and values on Hopper: codes go from memory straight into products.

A warp takes 64 keys at a time.  Eight query rows (heads of a group times queries) are the columns
of both products, so that codes are their left sides and no thread works for rows that are not:

    scores  [keys, rows]      = codes of keys @ (q * scale) + offset @ q
    output  [channels, rows] += codes of values @ (p * scale) + sum of p * offset

The scales of 64 keys belong to channels and go into the queries once; those of values belong to
tokens and go into the weights.  A code c is never converted: as bits of a float16 it is the number
c * 2^-24, which the matrix units read exactly, and the factor is made good afterwards.  Two codes
are one or one and a half instructions that spread bytes.

Which thread holds what is written out by hand (saccade.ops.attend.gluon_registers): thread t of a
row of four reads neighbouring channels of keys, 8 g .. 8 g + 7 are the keys of row g; for values
row g reads neighbouring channels and thread t the keys 16 t .. 16 t + 15.  Weights change sides by
one 8 x 8 transposition in registers.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attend.gluon_registers import (
    close_copies,
    copy_line,
    from_bfloat16,
    from_fp8,
    halves,
    load_words,
    max_over_rows,
    meet,
    multiply,
    number_of,
    own_memory,
    pick_bytes,
    read_words,
    sum_over_rows,
    times,
    times_half,
    transposed,
    wait_copies,
)
from saccade.ops.attend.triton_decode import begin_early
from saccade.ops.tiles import key_tiles

KEYS = gl.constexpr(64)  # of a warp's tile
ROWS = gl.constexpr(8)  # query rows of a program
LOG2E, LN2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e24)  # below every score, and finite after the factor 2^24
RAISED = gl.constexpr(8.0)  # weights are enlarged by 2^8, clear of float16's denormal numbers
TINY = gl.constexpr(2.0**-24)  # what the bits of an integer code mean in float16


@gluon.jit
def load_many(address, FIRST: gl.constexpr, STEP: gl.constexpr, COUNT: gl.constexpr,
              WORDS: gl.constexpr):  # fmt: skip
    """WORDS words at each of COUNT places STEP bytes apart, in order."""
    found = load_words(address, FIRST, WORDS)
    for i in gl.static_range(1, COUNT):
        found = found + load_words(address, FIRST + i * STEP, WORDS)
    return found


@gluon.jit
def copy_keys(place, address, thread, ROW: gl.constexpr):
    """Ask for the codes of 64 keys, 512 bytes at a time; every other 8 rows change 64-byte halves."""
    for n in gl.static_range(ROW // 8):
        if ROW >= 64:
            turned = (thread * 16) ^ (64 * ((64 * n // ROW) % 2))
        else:
            turned = (thread * 16) ^ (64 * (thread // 16))
        copy_line(place + turned, address + thread * 16, 512 * n, 512 * n)


@gluon.jit
def copy_values(place, address, thread, ROW: gl.constexpr):
    """The same for values; 32-byte quarters change places by groups of 16 rows."""
    for n in gl.static_range(ROW // 8):
        turned = (thread * 16) ^ (32 * ((32 * n // ROW) % 4))
        copy_line(place + turned, address + thread * 16, 512 * n, 512 * n)


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
            found = found + read_codes(place, key * ROW + half * (D // 2), 64, D // 32)
    return found


@gluon.jit
def read_values(place, ROW: gl.constexpr, D: gl.constexpr):
    """D / 64 words of both halves of sixteen values, in the same order."""
    found = ()
    for key in gl.static_range(16):
        for half in gl.static_range(2 if ROW == D else 1):
            found = found + read_codes(place, key * ROW + half * (D // 2), 96, D // 64)
    return found


@gluon.jit
def copy_numbers(place, scale, offset, thread, SIZE: gl.constexpr):
    """Ask for SIZE bytes of scales and as many of offsets, which lie behind them."""
    EACH: gl.constexpr = SIZE // 16  # threads for each
    who = thread % EACH
    address = gl.where(thread % (2 * EACH) < EACH, scale, offset) + who * 16
    copy_line(place + (thread % (2 * EACH)) * 16, address, 0, 0)


@gluon.jit
def read_channels(place, D: gl.constexpr):
    """Float16 numbers of a thread's channels, D / 8 of each half, in pairs."""
    found = read_words(place, 0, 4)
    if D == 128:
        found = found + read_words(place, 16, 4)
    found = found + read_words(place, D, 4)
    if D == 128:
        found = found + read_words(place, D + 16, 4)
    return found


@gluon.jit
def read_tokens(place, V_GROUPS: gl.constexpr):
    """Float16 numbers of a thread's eight keys, in pairs."""
    found = read_words(place, 0, 4)
    if V_GROUPS == 2:
        found = found + read_words(place, 16, 4)
    return found


@gluon.jit
def load_channels(address, D: gl.constexpr):
    """Float16 numbers of a thread's channels, D / 8 of each half, in pairs."""
    HALF: gl.constexpr = D  # bytes
    COUNT: gl.constexpr = D // 64
    return load_many(address, 0, 16, COUNT, 4) + load_many(address, HALF, 16, COUNT, 4)


@gluon.jit
def channels_of_word(words, ROW: gl.constexpr, SIDE: gl.constexpr, WORD: gl.constexpr,
                     WORDS: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Four channels of a key as two pairs (int4: the even ones, then the odd ones)."""
    if FORMAT == "int4":
        x = words[ROW * WORDS + WORD]
        MASK: gl.constexpr = 0x00F000F0 if SIDE == 1 else 0x000F000F
        pairs = (x & MASK, (x >> 8) & MASK)
    else:
        x = words[(ROW * 2 + SIDE) * WORDS + WORD]
        if FORMAT == "fp8":
            pairs = (from_fp8(x, 0), from_fp8(x, 1))
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (pick_bytes(x, zero, 0x4140), pick_bytes(x, zero, 0x4342))
    return pairs


@gluon.jit
def keys_of_words(x, y, PAIR: gl.constexpr, SIDE: gl.constexpr, FORMAT: gl.constexpr):
    """Channels 2 PAIR and 2 PAIR + 1 of the words of two keys, each a pair over the keys."""
    if FORMAT == "fp8":
        both = pick_bytes(x, y, 0x7362 if PAIR == 1 else 0x5140)
        pairs = (from_fp8(both, 0), from_fp8(both, 1))
    else:
        both = pick_bytes(x, y, 0x7632 if PAIR == 1 else 0x5410)
        if FORMAT == "int4":
            MASK: gl.constexpr = 0x00F000F0 if SIDE == 1 else 0x000F000F
            pairs = (both & MASK, (both >> 8) & MASK)
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (both & 0x00FF00FF, pick_bytes(both, zero, 0x4341))
    return pairs


@gluon.jit
def load_queries(address, D: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of float16 of a thread's channels of its query row."""
    found = load_channels(address, D)
    if DTYPE == gl.bfloat16:
        converted = (from_bfloat16(found[0]),)
        for i in gl.static_range(1, D // 8):
            converted = converted + (from_bfloat16(found[i]),)
        found = converted
    return found


@gluon.jit
def offset_scores(q, offset, D: gl.constexpr):
    """Sum over channels of q * offset, for the two query rows of a thread."""
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    low = (zero, zero, zero, zero)
    high = (zero, zero, zero, zero)
    SIDE: gl.constexpr = D // 16
    for i in gl.static_range(D // 32):
        x, y = offset[2 * i], offset[2 * i + 1]
        low = multiply((x, x, y, y), (q[2 * i], q[2 * i + 1]), low)
        x, y = offset[SIDE + 2 * i], offset[SIDE + 2 * i + 1]
        high = multiply((x, x, y, y), (q[SIDE + 2 * i], q[SIDE + 2 * i + 1]), high)
    return low[0] + high[0], low[1] + high[1]


@gluon.jit
def scores_of_keys(q, words, scale, offset, D: gl.constexpr, FORMAT: gl.constexpr):
    """Scores of keys 8 g .. 8 g + 7 and two query rows: four registers for every two keys."""
    WORDS: gl.constexpr = D // 32
    first, second = offset_scores(q, offset, D)
    if FORMAT != "fp8":
        first, second = first * TINY, second * TINY
    s0 = (first, second, first, second)
    s = (s0, s0, s0, s0)
    for side in gl.static_range(2):
        for word in gl.static_range(WORDS):
            s = add_channels(s, q, words, scale, side, word, WORDS, FORMAT)
    return s[0] + s[1] + s[2] + s[3]


@gluon.jit
def add_channels(s, q, words, scale, SIDE: gl.constexpr, WORD: gl.constexpr, WORDS: gl.constexpr,
                 FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of eight keys) @ (q * scale)."""
    AT: gl.constexpr = 2 * (SIDE * WORDS + WORD)
    low, high = times(q[AT], scale[AT]), times(q[AT + 1], scale[AT + 1])
    if FORMAT == "int4":
        if SIDE == 1:  # its codes are read sixteen times as large
            part = gl.full(low.shape, 0x2C002C00, gl.int32, low.type.layout)
            low, high = times(low, part), times(high, part)
        low, high = pick_bytes(low, high, 0x5410), pick_bytes(low, high, 0x7632)
    right = (low, high)
    return (
        add_keys(s[0], words, 0, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[1], words, 2, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[2], words, 4, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[3], words, 6, right, SIDE, WORD, WORDS, FORMAT),
    )


@gluon.jit
def add_keys(s, words, KEY: gl.constexpr, right, SIDE: gl.constexpr, WORD: gl.constexpr,
             WORDS: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of keys KEY and KEY + 1) @ right."""
    a0, a2 = channels_of_word(words, KEY, SIDE, WORD, WORDS, FORMAT)
    a1, a3 = channels_of_word(words, KEY + 1, SIDE, WORD, WORDS, FORMAT)
    return multiply((a0, a1, a2, a3), right, s)


@gluon.jit
def add_values(acc, words, weights, SIDE: gl.constexpr, TILE: gl.constexpr, WORDS: gl.constexpr,
               FORMAT: gl.constexpr):  # fmt: skip
    """acc + channels 2 TILE, 2 TILE + 1 of each row g and half, over all keys, times weights."""
    STEP: gl.constexpr = WORDS if FORMAT == "int4" else 2 * WORDS  # from key to key
    AT: gl.constexpr = TILE // 2 + (0 if FORMAT == "int4" else SIDE * WORDS)
    for i in gl.static_range(4):
        a0, a1 = keys_of_words(
            words[2 * i * STEP + AT], words[(2 * i + 8) * STEP + AT], TILE % 2, SIDE, FORMAT
        )
        a2, a3 = keys_of_words(
            words[(2 * i + 1) * STEP + AT], words[(2 * i + 9) * STEP + AT], TILE % 2, SIDE, FORMAT
        )
        acc = multiply((a0, a1, a2, a3), (weights[2 * i], weights[2 * i + 1]), acc)
    return acc


@gluon.jit
def see_edges(s, scale, offset, at, q_first, q_second, k_len, rules, CAUSAL: gl.constexpr,
              V_GROUPS: gl.constexpr):  # fmt: skip
    """Scores that are -inf where a row does not see a key; numbers of keys that are not are 0."""
    seen = ()
    kept_scale, kept_offset = (), ()
    for key in gl.static_range(8):
        k_pos = at + key
        real = k_pos < k_len
        for column in gl.static_range(2):
            q_pos = q_first if column == 0 else q_second
            see = real
            if CAUSAL:
                see = see & (k_pos <= q_pos)
            if rules.window is not None:
                near = q_pos - k_pos < rules.window
                if rules.sinks is not None:
                    near = near | (k_pos < rules.sinks)
                see = see & near
            seen = seen + (gl.where(see, s[2 * key + column], float("-inf")),)
        if V_GROUPS == 2:
            keep = gl.where(real, -1, 0)
            kept_scale = kept_scale + (scale[key] & keep,)
            kept_offset = kept_offset + (offset[key] & keep,)
        elif key % 2 == 0:
            keep = gl.where(real, 0xFFFF, 0) | gl.where(k_pos + 1 < k_len, -65536, 0)
            kept_scale = kept_scale + (scale[key // 2] & keep,)
            kept_offset = kept_offset + (offset[key // 2] & keep,)
    return seen, kept_scale, kept_offset


@gluon.jit
def weights_of(s, top, unit, COLUMN: gl.constexpr):
    """(new maximum, what the old sums shrink by, weights of eight keys, their sum) of a row."""
    most = s[COLUMN]
    for key in gl.static_range(1, 8):
        most = gl.maximum(most, s[2 * key + COLUMN])
    most = gl.maximum(top, max_over_rows(most))
    base = most * unit - RAISED
    p = (gl.exp2(s[COLUMN] * unit - base),)
    total = p[0]
    for key in gl.static_range(1, 8):
        p = p + (gl.exp2(s[2 * key + COLUMN] * unit - base),)
        total += p[key]
    return most, gl.exp2((top - most) * unit), p, total


@gluon.jit
def add_offsets(p, offset, total, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """total + sum over a thread's keys of p * offset."""
    for key in gl.static_range(8):
        if V_GROUPS == 2:
            number = number_of(offset[key], GROUP)
        else:
            number = number_of(offset[key // 2], key % 2)
        total += p[key] * number
    return total


@gluon.jit
def scaled_weights(pairs, scale, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Pairs over query rows times the scale of their key, turned into pairs over keys."""
    found = ()
    for key in gl.static_range(8):
        if V_GROUPS == 2:
            weight = times_half(pairs[key], scale[key], GROUP)
        else:
            weight = times_half(pairs[key], scale[key // 2], key % 2)
        found = found + (transposed(weight),)
    return found


@gluon.jit
def shrunk(acc, first, second):
    """Four registers of a result times the factors of their rows."""
    return acc[0] * first, acc[1] * second, acc[2] * first, acc[3] * second


@gluon.jit
def tile_of(i, last, num_sinks, first):
    """Which tile of 64 keys is the i-th of those to visit, at most the last."""
    i = gl.maximum(gl.minimum(i, last - 1), 0)
    return gl.where(i < num_sinks, i, i - num_sinks + first)


@gluon.jit
def ask_for_keys(place, numbers, codes, scale, offset, tile, thread, ROW: gl.constexpr,
                 GROUP: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """One group of copies: codes, scales and offsets of a tile of keys."""
    tile = tile.to(gl.int64)
    group = tile * KEYS // GROUP * (2 * D)
    copy_keys(place, codes + tile * (KEYS * ROW), thread, ROW)
    copy_numbers(numbers, scale + group, offset + group, thread, 2 * D)
    close_copies(thread)


@gluon.jit
def ask_for_values(place, numbers, codes, scale, offset, tile, thread, ROW: gl.constexpr,
                   V_GROUPS: gl.constexpr):  # fmt: skip
    """The same for a tile of values."""
    tile = tile.to(gl.int64)
    copy_values(place, codes + tile * (KEYS * ROW), thread, ROW)
    at = tile * (2 * KEYS * V_GROUPS)
    copy_numbers(numbers, scale + at, offset + at, thread, 2 * KEYS * V_GROUPS)
    close_copies(thread)


@gluon.jit
def head_address(plane, b, kv_head, SIZE: gl.constexpr):
    """Address of the first row of a head, of elements of SIZE bytes."""
    return plane.ptr.to(gl.int64) + (b * plane.batch + kv_head.to(gl.int64) * plane.head) * SIZE


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def codes_kernel(
    q, k, v, out, lse, bounds, rules, sink_logits, scale,
    q_len, k_len, q_offset, splits, out_split, lse_split, kv_heads, groups,
    D: gl.constexpr, K_FORMAT: gl.constexpr, V_FORMAT: gl.constexpr, K_GROUP: gl.constexpr,
    V_GROUPS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split: 64 keys a warp and round, the next keys always on their way."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    begin_early(True)
    K_ROW: gl.constexpr = D // 2 if K_FORMAT == "int4" else D
    V_ROW: gl.constexpr = D // 2 if V_FORMAT == "int4" else D
    thread = gl.arange(0, 32, layout=L)
    g, t = thread // 4, thread % 4
    tile = gl.program_id(0) // splits
    split = gl.program_id(0) % splits
    b = (gl.program_id(1) // kv_heads).to(gl.int64)
    kv_head = gl.program_id(1) % kv_heads
    if bounds.offsets is not None:
        q_offset = gl.load(bounds.offsets + b).to(gl.int32)
    if bounds.lengths is not None:
        at = b * bounds.lengths_batch + kv_head * bounds.lengths_head
        k_len = gl.minimum(k_len, gl.load(bounds.lengths + at).to(gl.int32))

    rows = q_len * groups
    first_q = q_offset + tile * ROWS // groups
    last_q = q_offset + gl.minimum((tile * ROWS + ROWS - 1) // groups, q_len - 1)
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, rules, CAUSAL, KEYS
    )
    count = num_sinks + last - first
    each = gl.cdiv(count, splits)
    begin, end = gl.minimum(split * each, count), gl.minimum((split + 1) * each, count)

    row = gl.minimum(tile * ROWS + g, rows - 1)
    q_at = (row % groups + kv_head * groups).to(gl.int64) * q.head
    q_at += (row // groups).to(gl.int64) * q.row + b * q.batch
    q_pairs = load_queries(q.ptr.to(gl.int64) + q_at * 2 + t * (D // 4), D, q.ptr.dtype.element_ty)
    q_first = (tile * ROWS + 2 * t) // groups + q_offset
    q_second = (tile * ROWS + 2 * t + 1) // groups + q_offset

    k_at = head_address(k.codes, b, kv_head, 1)
    k_scale_at, k_offset_at = (
        head_address(k.scale, b, kv_head, 2),
        head_address(k.offset, b, kv_head, 2),
    )
    v_at = head_address(v.codes, b, kv_head, 1)
    v_scale_at, v_offset_at = (
        head_address(v.scale, b, kv_head, 2),
        head_address(v.offset, b, kv_head, 2),
    )
    V_PLACE: gl.constexpr = KEYS * K_ROW
    K_NUMBERS: gl.constexpr = V_PLACE + KEYS * V_ROW
    V_NUMBERS: gl.constexpr = K_NUMBERS + 4 * D
    k_place = own_memory(thread, V_NUMBERS + 4 * KEYS * V_GROUPS)
    v_place = k_place + V_PLACE
    k_numbers, v_numbers = k_place + K_NUMBERS, k_place + V_NUMBERS
    k_read = k_place + g * (8 * K_ROW) + ((t * (D // 8)) ^ (g % 2 * 64))
    v_read = v_place + t * (16 * V_ROW) + ((g * (D // 16)) ^ (t * 32))

    unit = scale * LOG2E
    if K_FORMAT != "fp8":
        unit = unit / TINY
    zero = gl.full([32], 0.0, gl.float32, L)
    nothing = (zero, zero, zero, zero)
    m0 = zero + LOWEST
    m1 = m0
    l0, l1, o00, o01, o10, o11 = zero, zero, zero, zero, zero, zero
    acc = (nothing,) * (D // 16)
    here = tile_of(begin, end, num_sinks, first)
    ask_for_keys(k_place, k_numbers, k_at, k_scale_at, k_offset_at, here, thread, K_ROW, K_GROUP, D)
    ask_for_values(v_place, v_numbers, v_at, v_scale_at, v_offset_at, here, thread, V_ROW, V_GROUPS)
    for i in range(begin, end):
        wait_copies(thread, 1)
        k_scale = read_channels(k_numbers + t * (D // 4), D)
        k_offset = read_channels(k_numbers + 2 * D + t * (D // 4), D)
        k_words = read_keys(k_read, K_ROW, D)
        s = scores_of_keys(q_pairs, k_words, k_scale, k_offset, D, K_FORMAT)
        meet(thread)
        after = tile_of(i + 1, end, num_sinks, first)
        ask_for_keys(k_place, k_numbers, k_at, k_scale_at, k_offset_at, after, thread, K_ROW,
                     K_GROUP, D)  # fmt: skip
        wait_copies(thread, 1)
        v_scale = read_tokens(v_numbers + g * (16 * V_GROUPS), V_GROUPS)
        v_offset = read_tokens(v_numbers + (2 * KEYS + g * 16) * V_GROUPS, V_GROUPS)
        scalar = i - num_sinks + first
        full = (i >= num_sinks) & (scalar >= full_from) & (scalar < full_to)
        if not full:
            s, v_scale, v_offset = see_edges(
                s, v_scale, v_offset, here * KEYS + g * 8, q_first, q_second, k_len, rules, CAUSAL,
                V_GROUPS,
            )  # fmt: skip
        m0, shrink0, p0, sum0 = weights_of(s, m0, unit, 0)
        m1, shrink1, p1, sum1 = weights_of(s, m1, unit, 1)
        l0, l1 = l0 * shrink0 + sum0, l1 * shrink1 + sum1
        o00 = add_offsets(p0, v_offset, o00 * shrink0, V_GROUPS, 0)
        o01 = add_offsets(p1, v_offset, o01 * shrink1, V_GROUPS, 0)
        if V_GROUPS == 2:
            o10 = add_offsets(p0, v_offset, o10 * shrink0, V_GROUPS, 1)
            o11 = add_offsets(p1, v_offset, o11 * shrink1, V_GROUPS, 1)
        pairs = ()
        for key in gl.static_range(8):
            pairs = pairs + (halves(p0[key], p1[key]),)
        weights = scaled_weights(pairs, v_scale, V_GROUPS, 0)
        v_words = read_values(v_read, V_ROW, D)
        taken = ()
        for j in gl.static_range(D // 16):
            if j == D // 32 and V_GROUPS == 2:
                weights = scaled_weights(pairs, v_scale, V_GROUPS, 1)
            taken = taken + (
                add_values(shrunk(acc[j], shrink0, shrink1), v_words, weights, j // (D // 32),
                           j % (D // 32), D // 64, V_FORMAT),
            )  # fmt: skip
        acc = taken
        meet(thread)
        here = after
        ask_for_values(v_place, v_numbers, v_at, v_scale_at, v_offset_at, here, thread, V_ROW,
                       V_GROUPS)  # fmt: skip
    if V_GROUPS == 1:
        o10, o11 = o00, o01
    offsets = (sum_over_rows(o00), sum_over_rows(o01), sum_over_rows(o10), sum_over_rows(o11))
    sums = (sum_over_rows(l0), sum_over_rows(l1))
    store(acc, offsets, (m0, m1), sums, unit, out, lse, sink_logits, tile, split, out_split,
          lse_split, b, kv_head, kv_heads, groups, q_len, g, t, D, V_FORMAT)  # fmt: skip


@triton.constexpr_function
def factor_of(form, side):
    """What a code times a weight has to be multiplied by, given how its bits were read."""
    if form == "fp8":
        return 1.0
    return 2.0**20 if form == "int4" and side == 1 else 2.0**24


@gluon.jit
def store(acc, offsets, tops, sums, unit, out, lse, sink_logits, tile, split, out_split, lse_split,
          b, kv_head, kv_heads, groups, q_len, g, t, D: gl.constexpr,
          V_FORMAT: gl.constexpr):  # fmt: skip
    """Write the output and lse of the two rows of a thread."""
    for c in gl.static_range(2):
        row = tile * ROWS + 2 * t + c
        index = row // groups
        h = kv_head * groups + row % groups
        keep = index < q_len
        l = sums[c]
        top = gl.where(l == 0, LOWEST, tops[c] * unit - RAISED)
        shrink = l * 0.0 + 1.0
        if sink_logits is not None:
            sink = gl.load(sink_logits + h, mask=keep & (split == 0), other=float("-inf")) * LOG2E
            raised = gl.maximum(top, sink)
            shrink = gl.exp2(top - raised)
            l = l * shrink + gl.exp2(sink - raised)
            top = raised
        safe = gl.where(l == 0, 1.0, l)
        found = gl.where(l == 0, float("-inf"), (top + gl.log2(safe)) * LN2)
        at = lse + split.to(gl.int64) * lse_split + (b * kv_heads * groups + h) * q_len + index
        gl.store(at, found, mask=keep & (g == 0))
        at = out.ptr + split.to(gl.int64) * out_split + b * out.batch
        at = at + h.to(gl.int64) * out.head + index.to(gl.int64) * out.row + g * (D // 16)
        shrink = shrink / safe
        for j in gl.static_range(D // 16):
            for odd in gl.static_range(2):
                number = acc[j][2 * odd + c] * factor_of(V_FORMAT, j // (D // 32))
                number = (number + offsets[2 * (j // (D // 32)) + c]) * shrink
                channel = j // (D // 32) * (D // 2) + j % (D // 32) * 2 + odd
                gl.store(at + channel, number.to(out.ptr.dtype.element_ty), mask=keep)
