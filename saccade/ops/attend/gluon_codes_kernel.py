"""Decoding over quantised keys and values on Hopper: codes go from memory straight into products.

A warp takes 64 keys at a time.  Eight query rows (heads of a group times queries) are the columns
of both products, so that codes are their left sides and no thread works for rows that are not:

    scores  [keys, rows]      = codes of keys @ (q * scale) + offset @ q
    output  [channels, rows] += codes of values @ (p * scale) + sum of p * offset

The scales of 64 keys belong to channels and go into the queries once; those of values belong to
tokens and go into the weights; codes themselves are never converted (gluon_codes_products).

Which thread holds what is written out by hand (saccade.ops.attend.gluon_registers): thread t of a
row of four reads neighbouring channels of keys, 8 g .. 8 g + 7 are the keys of row g; for values
row g reads neighbouring channels and thread t the keys 16 t .. 16 t + 15.  Weights change sides by
one 8 x 8 transposition in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attend.gluon_codes_memory import (
    KEYS,
    addresses,
    ask_for_keys,
    ask_for_values,
    clear_values,
    load_queries,
    read_channels,
    read_keys,
    read_tokens,
    read_values,
)
from saccade.ops.attend.gluon_codes_products import (
    TINY,
    add_values,
    factor_of,
    scores_of_keys,
)
from saccade.ops.attend.gluon_registers import (
    halves,
    max_over_rows,
    meet,
    number_of,
    own_memory,
    sum_over_rows,
    times_half,
    transposed,
    wait_copies,
)
from saccade.ops.attend.triton_decode import begin_early
from saccade.ops.tiles import key_tiles

ROWS = gl.constexpr(8)  # query rows of a program
LOG2E, LN2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e24)  # below every score, and finite after the factor 2^24
RAISED = gl.constexpr(8.0)  # weights are enlarged by 2^8, clear of float16's denormal numbers


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
            seen += (gl.where(see, s[2 * key + column], float("-inf")),)
        if V_GROUPS == 2:
            keep = gl.where(real, -1, 0)
            kept_scale += (scale[key] & keep,)
            kept_offset += (offset[key] & keep,)
        elif key % 2 == 0:
            keep = gl.where(real, 0xFFFF, 0) | gl.where(k_pos + 1 < k_len, -65536, 0)
            kept_scale += (scale[key // 2] & keep,)
            kept_offset += (offset[key // 2] & keep,)
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
        p += (gl.exp2(s[2 * key + COLUMN] * unit - base),)
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
        found += (transposed(weight),)
    return found


@gluon.jit
def shrunk(acc, first, second):
    """Four registers of a result times the factors of their rows."""
    return acc[0] * first, acc[1] * second, acc[2] * first, acc[3] * second


@gluon.jit
def next_place(place, wraps, SIZE: gl.constexpr, STAGES: gl.constexpr):
    """Where the next tile lies: behind this one, or again at the first."""
    return place + gl.where(wraps, SIZE - SIZE * STAGES, SIZE)


@gluon.jit
def tile_of(i, last, num_sinks, first, tiles):
    """Which of the stored tiles is the i-th to visit; past the last one, one that can be read."""
    i = gl.maximum(gl.minimum(i, last - 1), 0)
    return gl.minimum(gl.where(i < num_sinks, i, i - num_sinks + first), tiles - 1)


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def codes_kernel(
    q, k, v, out, lse, bounds, rules, sink_logits, scale, q_len, k_len, q_offset, out_split,
    lse_split, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
    K_FORMAT: gl.constexpr, V_FORMAT: gl.constexpr, K_GROUP: gl.constexpr, V_GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split: 64 keys a warp and round, the next STAGES tiles on their way."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    begin_early(EARLY)
    K_ROW: gl.constexpr = D // 2 if K_FORMAT == "int4" else D
    V_ROW: gl.constexpr = D // 2 if V_FORMAT == "int4" else D
    thread = gl.arange(0, 32, layout=L)
    g, t = thread // 4, thread % 4
    split, splits, tile = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    b = (gl.program_id(2) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(2) % KV_HEADS
    tiles = k_len // KEYS
    if bounds.offsets is not None:
        q_offset = gl.load(bounds.offsets + b).to(gl.int32)
    if bounds.lengths is not None:
        at = b * bounds.lengths_batch + kv_head * bounds.lengths_head
        k_len = gl.minimum(k_len, gl.load(bounds.lengths + at).to(gl.int32))

    rows = q_len * GROUPS
    first_q = q_offset + tile * ROWS // GROUPS
    last_q = q_offset + gl.minimum((tile * ROWS + ROWS - 1) // GROUPS, q_len - 1)
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, rules, CAUSAL, KEYS
    )
    count = num_sinks + last - first
    each = gl.cdiv(count, splits)
    begin, end = gl.minimum(split * each, count), gl.minimum((split + 1) * each, count)

    k_from, v_from = addresses(k, b, kv_head), addresses(v, b, kv_head)
    V_PLACE: gl.constexpr = KEYS * K_ROW
    K_NUMBERS: gl.constexpr = V_PLACE + KEYS * V_ROW
    V_NUMBERS: gl.constexpr = K_NUMBERS + 4 * D
    SIZE: gl.constexpr = V_NUMBERS + 4 * KEYS * V_GROUPS  # of a tile, a multiple of 256
    place = own_memory(thread, SIZE * STAGES)
    for stage in gl.static_range(STAGES):
        here = tile_of(begin + stage, end, num_sinks, first, tiles)
        at = place + stage * SIZE
        ask_for_keys(at, at + K_NUMBERS, k_from, here, thread, K_ROW, K_GROUP, D)
        ask_for_values(at + V_PLACE, at + V_NUMBERS, v_from, here, thread, V_ROW, V_GROUPS)
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
    zero = gl.full([32], 0.0, gl.float32, L)
    nothing = (zero, zero, zero, zero)
    m0 = zero + LOWEST
    m1 = m0
    l0, l1, o00, o01, o10, o11 = zero, zero, zero, zero, zero, zero
    acc = (nothing,) * (D // 16)
    for i in range(begin, end):
        wait_copies(thread, 2 * STAGES - 1)
        k_scale = read_channels(place + K_NUMBERS + t * (D // 4), D)
        k_offset = read_channels(place + K_NUMBERS + 2 * D + t * (D // 4), D)
        k_words = read_keys(place + k_read, K_ROW, D)
        s = scores_of_keys(q_pairs, k_words, k_scale, k_offset, D, K_FORMAT)
        meet(thread)
        after = tile_of(i + STAGES, end, num_sinks, first, tiles)
        ask_for_keys(place, place + K_NUMBERS, k_from, after, thread, K_ROW, K_GROUP, D)
        wait_copies(thread, 2 * STAGES - 1)
        v_scale = read_tokens(place + V_NUMBERS + g * (16 * V_GROUPS), V_GROUPS)
        v_offset = read_tokens(place + V_NUMBERS + (2 * KEYS + g * 16) * V_GROUPS, V_GROUPS)
        scalar = i - num_sinks + first
        full = (i >= num_sinks) & (scalar >= full_from) & (scalar < full_to)
        if not full:
            here = tile_of(i, end, num_sinks, first, tiles)
            if V_FORMAT == "fp8":
                clear_values(place + V_PLACE, thread, k_len - here * KEYS, V_ROW)
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
            pairs += (halves(p0[key], p1[key]),)
        weights = scaled_weights(pairs, v_scale, V_GROUPS, 0)
        v_words = read_values(place + v_read, V_ROW, D)
        taken = ()
        for j in gl.static_range(D // 16):
            if j == D // 32 and V_GROUPS == 2:
                weights = scaled_weights(pairs, v_scale, V_GROUPS, 1)
            taken += (
                add_values(shrunk(acc[j], shrink0, shrink1), v_words, weights, j // (D // 32),
                           j % (D // 32), D // 64, V_FORMAT),
            )  # fmt: skip
        acc = taken
        meet(thread)
        ask_for_values(place + V_PLACE, place + V_NUMBERS, v_from, after, thread, V_ROW, V_GROUPS)
        if STAGES > 1:
            place = next_place(place, (i + 1 - begin) % STAGES == 0, SIZE, STAGES)
    if V_GROUPS == 1:
        o10, o11 = o00, o01
    offsets = (sum_over_rows(o00), sum_over_rows(o01), sum_over_rows(o10), sum_over_rows(o11))
    sums = (sum_over_rows(l0), sum_over_rows(l1))
    store(acc, offsets, (m0, m1), sums, unit, out, lse, sink_logits, tile, split, out_split,
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
        shrink = l * 0.0 + 1.0
        if sink_logits is not None:
            sink = gl.load(sink_logits + h, mask=keep & (split == 0), other=float("-inf")) * LOG2E
            raised = gl.maximum(top, sink)
            shrink = gl.exp2(top - raised)
            l = l * shrink + gl.exp2(sink - raised)
            top = raised
        safe = gl.where(l == 0, 1.0, l)
        found = gl.where(l == 0, float("-inf"), (top + gl.log2(safe)) * LN2)
        at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
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
