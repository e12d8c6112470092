"""Decoding over quantised keys and values on Hopper: codes go from memory straight into products.

A warp takes 64 keys at a time.  Eight query rows (heads of a group times queries) are the columns
of both products, so that codes are their left sides and no thread works for rows that are not:

    scores  [keys, rows]      = codes of keys @ (q * scale) + offset @ q
    output  [channels, rows] += codes of values @ (p * scale) + offsets of values @ p

The scales of 64 keys belong to channels and go into the queries once; those of values belong to
tokens and go into the weights; codes themselves are never converted (codes_products.py).  What
belongs to all keys of a tile (offset @ q) is added where scores become exponents.

Which thread holds what is written out by hand (saccade.ops.attention.nvidia.gluon.ptx): thread t of a
row of four reads neighbouring channels of keys, 8 g .. 8 g + 7 are the keys of row g; for values
row g reads neighbouring channels and thread t the keys 16 t .. 16 t + 15.  Weights change sides by
one 8 x 8 transposition in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx import (
    as_word,
    bfloat_halves,
    ended,
    halves,
    max_over_rows,
    meet,
    multiply,
    own_memory,
    pick_bytes,
    store_words,
    sum_over_rows,
    times,
    transposed,
    wait_copies,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.dequantize import (
    TINY,
    add_values,
    factor_of,
    scores_of_keys,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.smem import (
    KEYS,
    NUMBERS,
    addresses,
    ask_for_keys,
    ask_for_values,
    clear_values,
    expect_tile,
    load_queries,
    read_channels,
    read_keys,
    read_tokens,
    read_values,
)
from saccade.ops.gpu.triton_lang import key_tiles, pdl_begin

ROWS = gl.constexpr(8)  # query rows of a program
LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1e24)  # below every score, and finite after the factor 2^24
RAISED = gl.constexpr(6.0)  # weights are enlarged by 2^6, clear of float16's denormal numbers
ROOM = gl.constexpr(3.0)  # and may grow by 2^3 before all that was summed up is made smaller


@gluon.jit
def see_edges(s, at, q_first, q_second, k_len, mask_args, CAUSAL: gl.constexpr):
    """Scores of keys at .. at + 7 that are -inf where a row does not see a key."""
    seen = ()
    for key in gl.static_range(8):
        k_pos = at + key
        for column in gl.static_range(2):
            q_pos = q_first if column == 0 else q_second
            see = k_pos < k_len
            if CAUSAL:
                see = see & (k_pos <= q_pos)
            if mask_args.window is not None:
                near = q_pos - k_pos < mask_args.window
                if mask_args.sinks is not None:
                    near = near | (k_pos < mask_args.sinks)
                see = see & near
            seen += (gl.where(see, s[2 * key + column], float("-inf")),)
    return seen


@gluon.jit
def real_numbers(numbers, at, k_len, V_GROUPS: gl.constexpr):
    """Scales or offsets of values at .. at + 15, 0 for those that are not."""
    kept = ()
    for i in gl.static_range(8 * V_GROUPS):
        if V_GROUPS == 2:
            keep = gl.where(at + i < k_len, -1, 0)
        else:
            keep = gl.where(at + 2 * i < k_len, 0xFFFF, 0)
            keep = keep | gl.where(at + 2 * i + 1 < k_len, -65536, 0)
        kept += (numbers[i] & keep,)
    return kept


@gluon.jit
def most_of(s, COLUMN: gl.constexpr):
    """The largest score of a thread's eight keys."""
    most = s[COLUMN]
    for key in gl.static_range(1, 8):
        most = gl.maximum(most, s[2 * key + COLUMN])
    return most


@gluon.jit
def weights_of(s, base, unit, COLUMN: gl.constexpr):
    """(weights of eight keys, their sum) of a row: exp2(score * unit - base)."""
    p = (gl.exp2(s[COLUMN] * unit - base),)
    total = p[0]
    for key in gl.static_range(1, 8):
        p += (gl.exp2(s[2 * key + COLUMN] * unit - base),)
        total += p[key]
    return p, total


@gluon.jit
def pair_of(numbers, KEY: gl.constexpr, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Float16 numbers of a thread's values KEY and KEY + 8 as a pair."""
    if V_GROUPS == 2:
        x, y = numbers[KEY], numbers[KEY + 8]
        pair = pick_bytes(x, y, 0x5410 if GROUP == 0 else 0x7632)
    else:
        x, y = numbers[KEY // 2], numbers[KEY // 2 + 4]
        pair = pick_bytes(x, y, 0x5410 if KEY % 2 == 0 else 0x7632)
    return pair


@gluon.jit
def add_offsets(sums, weights, offset, V_GROUPS: gl.constexpr):
    """sums + weights @ offsets of both halves of a head: rows 0 to 7 and 8 to 15 of a product."""
    for i in gl.static_range(0, 8, 2):
        low, next_low = pair_of(offset, i, V_GROUPS, 0), pair_of(offset, i + 1, V_GROUPS, 0)
        high, next_high = low, next_low
        if V_GROUPS == 2:
            high, next_high = pair_of(offset, i, V_GROUPS, 1), pair_of(offset, i + 1, V_GROUPS, 1)
        sums = multiply((low, high, next_low, next_high), (weights[i], weights[i + 1]), sums)
    return sums


@gluon.jit
def scaled_weights(weights, scale, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Weights, pairs over keys KEY and KEY + 8 of a thread, times the scales of their values."""
    found = ()
    for key in gl.static_range(8):
        found += (times(weights[key], pair_of(scale, key, V_GROUPS, GROUP)),)
    return found


@gluon.jit
def shrunk(acc, first, second):
    """Four registers of a result times the factors of their rows."""
    return acc[0] * first, acc[1] * second, acc[2] * first, acc[3] * second


@gluon.jit
def raised(acc, sums, top, new_top, total, unit):
    """All sums so far in terms of a new maximum: (acc, sums, total), each of two rows."""
    first = gl.exp2((top[0] - new_top[0]) * unit)
    second = gl.exp2((top[1] - new_top[1]) * unit)
    taken = ()
    for j in gl.static_range(len(acc)):
        taken += (shrunk(acc[j], first, second),)
    return taken, shrunk(sums, first, second), (total[0] * first, total[1] * second)


@gluon.jit
def tile_of(i, num_sinks, first):
    """Which of the stored tiles is the i-th to visit."""
    return gl.where(i < num_sinks, i, i - num_sinks + first)


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def codes_kernel(
    q, k, v, out, lse, seqlen_info, mask_args, sink_logits, scale, q_len, k_len, q_offset, out_split,
    lse_split, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
    K_FORMAT: gl.constexpr, V_FORMAT: gl.constexpr, K_GROUP: gl.constexpr, V_GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split: 64 keys a warp and round, the next ones always on their way.

    The programs of a head take its tiles in turn, so what they read at a time lies together.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    TOLD: gl.constexpr = seqlen_info.q_offsets is not None or seqlen_info.kv_lens is not None
    if TOLD:
        pdl_begin(PDL)
    K_ROW: gl.constexpr = D // 2 if K_FORMAT == "int4" else D
    V_ROW: gl.constexpr = D // 2 if V_FORMAT == "int4" else D
    thread = gl.arange(0, 32, layout=L)
    g, t = thread // 4, thread % 4
    split, splits, tile = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    b = (gl.program_id(2) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(2) % KV_HEADS
    if seqlen_info.q_offsets is not None:
        q_offset = gl.load(seqlen_info.q_offsets + b).to(gl.int32)
    if seqlen_info.kv_lens is not None:
        at = b * seqlen_info.kv_lens_batch + kv_head * seqlen_info.kv_lens_head
        k_len = gl.minimum(k_len, gl.load(seqlen_info.kv_lens + at).to(gl.int32))

    rows = q_len * GROUPS
    first_q = q_offset + tile * ROWS // GROUPS
    last_q = q_offset + gl.minimum((tile * ROWS + ROWS - 1) // GROUPS, q_len - 1)
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, mask_args, CAUSAL, KEYS
    )
    count = num_sinks + last - first

    k_from, v_from = addresses(k, b, kv_head), addresses(v, b, kv_head)
    V_PLACE: gl.constexpr = KEYS * K_ROW
    K_NUMBERS: gl.constexpr = V_PLACE + KEYS * V_ROW
    V_NUMBERS: gl.constexpr = K_NUMBERS + NUMBERS
    SIZE: gl.constexpr = V_NUMBERS + NUMBERS  # of a tile
    place = own_memory(thread, SIZE)
    here = tile_of(split, num_sinks, first)
    if not TOLD:
        expect_tile(k_from, v_from, here, thread, split < count, K_ROW, V_ROW, K_GROUP, V_GROUPS, D)
        pdl_begin(PDL)
    size = gl.where(thread < (count - split) * 32, 16, 0)
    ask_for_keys(place, place + K_NUMBERS, k_from, here, thread, size, K_ROW, K_GROUP, D)
    ask_for_values(place + V_PLACE, place + V_NUMBERS, v_from, here, thread, size, V_ROW, V_GROUPS)
    k_read = g * (8 * K_ROW) + ((t * (D // 8)) ^ (g % 2 * 64))
    v_read = V_PLACE + t * (16 * V_ROW) + ((g * (D // 16)) ^ (t * 32))

    row = gl.minimum(tile * ROWS + g, rows - 1)
    q_at = (row % GROUPS + kv_head * GROUPS).to(gl.int64) * q.head
    q_at += (row // GROUPS).to(gl.int64) * q.row + b * q.batch
    q_pairs = load_queries(q.ptr.to(gl.int64) + q_at * 2 + t * (D // 4), D, K_FORMAT,
                           q.ptr.dtype.element_ty)  # fmt: skip
    q_first = (tile * ROWS + 2 * t) // GROUPS + q_offset
    q_second = (tile * ROWS + 2 * t + 1) // GROUPS + q_offset

    unit = scale * LOG2E
    if K_FORMAT != "fp8":
        unit = unit / TINY
    room = ROOM / unit
    zero = gl.full([32], 0.0, gl.float32, L)
    nothing = (zero, zero, zero, zero)
    m = (zero + LOWEST, zero + LOWEST)
    l = (zero, zero)
    sums = nothing
    acc = (nothing,) * (D // 16)
    for i in range(split, count, splits):
        wait_copies(thread, 1)
        k_scale = read_channels(place + K_NUMBERS + t * (D // 4), D)
        k_offset = read_channels(place + K_NUMBERS + 2 * D + t * (D // 4), D)
        k_words = read_keys(place + k_read, K_ROW, D)
        s, more0, more1 = scores_of_keys(q_pairs, k_words, k_scale, k_offset, D, K_FORMAT)
        meet(thread)
        after = tile_of(i + splits, num_sinks, first)
        size = gl.where(thread < (count - i - splits) * 32, 16, 0)
        ask_for_keys(place, place + K_NUMBERS, k_from, after, thread, size, K_ROW, K_GROUP, D)
        wait_copies(thread, 1)
        v_scale = read_tokens(place + V_NUMBERS + t * (32 * V_GROUPS), V_GROUPS)
        v_offset = read_tokens(place + V_NUMBERS + (2 * KEYS + t * 32) * V_GROUPS, V_GROUPS)
        if (here < full_from) | (here >= full_to):
            key = here * KEYS
            s = see_edges(s, key + g * 8, q_first, q_second, k_len, mask_args, CAUSAL)
            v_scale = real_numbers(v_scale, key + t * 16, k_len, V_GROUPS)
            v_offset = real_numbers(v_offset, key + t * 16, k_len, V_GROUPS)
            if V_FORMAT == "fp8":
                clear_values(place + V_PLACE, thread, k_len - key, V_ROW)
        most0, most1 = most_of(s, 0) + more0, most_of(s, 1) + more1
        rises = (most0 > m[0] + room) | (most1 > m[1] + room)
        if gl.max(rises.to(gl.int32), axis=0) > 0:
            top = (gl.maximum(m[0], max_over_rows(most0)), gl.maximum(m[1], max_over_rows(most1)))
            acc, sums, l = raised(acc, sums, m, top, l, unit)
            m = top
        p0, sum0 = weights_of(s, (m[0] - more0) * unit - RAISED, unit, 0)
        p1, sum1 = weights_of(s, (m[1] - more1) * unit - RAISED, unit, 1)
        l = (l[0] + sum0, l[1] + sum1)
        pairs = ()
        for key in gl.static_range(8):
            pairs += (transposed(halves(p0[key], p1[key])),)
        sums = add_offsets(sums, pairs, v_offset, V_GROUPS)
        weights = scaled_weights(pairs, v_scale, V_GROUPS, 0)
        v_words = read_values(place + v_read, V_ROW, D)
        taken = ()
        for j in gl.static_range(D // 16):
            if j == D // 32 and V_GROUPS == 2:
                weights = scaled_weights(pairs, v_scale, V_GROUPS, 1)
            taken += (
                add_values(acc[j], v_words, weights, j // (D // 32), j % (D // 32), D // 64,
                           V_FORMAT),
            )  # fmt: skip
        acc = taken
        meet(thread)
        ask_for_values(place + V_PLACE, place + V_NUMBERS, v_from, after, thread, size, V_ROW,
                       V_GROUPS)  # fmt: skip
        here = after
    total = (sum_over_rows(l[0]), sum_over_rows(l[1]))
    store(acc, sums, m, total, unit, out, lse, sink_logits, tile, split, out_split,
          lse_split, b, kv_head, KV_HEADS, GROUPS, q_len, g, t, D, V_FORMAT)  # fmt: skip


@gluon.jit
def store(acc, offsets, tops, sums, unit, out, lse, sink_logits, tile, split, out_split, lse_split,
          b, kv_head, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, q_len, g, t, D: gl.constexpr,
          V_FORMAT: gl.constexpr):  # fmt: skip
    """Write the output and lse of the two rows of a thread."""
    for c in gl.static_range(2):
        row = tile * ROWS + 2 * t + c
        index = row // GROUPS
        h = kv_head * GROUPS + row % GROUPS
        keep = index < q_len
        l = sums[c]
        top = gl.where(l == 0, LOWEST, tops[c] * unit - RAISED)
        found, shrink, safe = ended(top, l, sink_logits, h, keep & (split == 0))
        at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
        gl.store(at, found, mask=keep & (g == 0))
        at = split.to(gl.int64) * out_split + b * out.batch
        at = at + h.to(gl.int64) * out.head + index.to(gl.int64) * out.row + g * (D // 16)
        numbers = ()
        for j in gl.static_range(D // 16):
            for odd in gl.static_range(2):
                number = acc[j][2 * odd + c] * factor_of(V_FORMAT, j // (D // 32))
                numbers += ((number + offsets[2 * (j // (D // 32)) + c]) * (shrink / safe),)
        store_row(out.ptr, at, numbers, keep.to(gl.int32), D)


@gluon.jit
def store_row(ptr, at, numbers, keep, D: gl.constexpr):
    """D / 16 numbers at element `at`, and as many half a head further on."""
    SIZE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    words = ()
    for i in gl.static_range(0, D // 8, 4 // SIZE):
        if SIZE == 4:
            words += (as_word(numbers[i]),)
        elif ptr.dtype.element_ty == gl.bfloat16:
            words += (bfloat_halves(numbers[i], numbers[i + 1]),)
        else:
            words += (halves(numbers[i], numbers[i + 1]),)
    address = ptr.to(gl.int64) + at * SIZE
    SIDE: gl.constexpr = D // 16 * SIZE // 4  # words
    for i in gl.static_range(0, 2 * SIDE, 2 if SIDE == 2 else 4):
        here = address + (i // SIDE * (D // 2 * SIZE) + i % SIDE * 4)
        if SIDE == 2:
            store_words(here, (words[i], words[i + 1]), keep)
        else:
            store_words(here, (words[i], words[i + 1], words[i + 2], words[i + 3]), keep)
