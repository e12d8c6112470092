"""Decoding over quantised keys and values on Hopper: every warp for itself, codes in registers.

A tensor here is `[warps, g 8, t 4, registers 4]`: what each lane 4 g + t of each warp holds in four
registers, a "quad".  Codes go from memory into the registers where the matrix units want them, and
become numbers on the way (saccade.ops.attend.gluon_codes_ptx); nothing passes through shared memory
until the warps of a program join their sums.  In one step a warp takes 32 or 64 keys:

    q' = q * scale of the group's channels         scores^T = codes q'^T + (q . offset)
    p  = exp2(scores - max)                        w = p * scale of each token
    sums^T = codes^T w^T + (p . offsets)

Keys (and channels of values) are rows of the products, so up to eight rows of queries times heads
cost one product.  The next step's codes are asked for as soon as this one's are used.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attend import gluon_codes_ptx as ptx

LOG2E = gl.constexpr(1.4426950408889634)
LN2, LOWEST = gl.constexpr(0.6931471805599453), gl.constexpr(-1e30)
# Weights times scales are small: 2^8 times as large, they stay clear of float16's denormal numbers.
RAISED = gl.constexpr(8.0)
ROWS = gl.constexpr(8)  # of queries times heads, in a product



@triton.constexpr_function
def quads(warps):
    """The layout of all tensors."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def places(WARPS: gl.constexpr):
    """(warp, g, t, register) of each element, ready to broadcast."""
    Q: gl.constexpr = quads(WARPS)
    w: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, Q)))
    g: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, Q)))
    t: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, Q)))
    r: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, Q)))
    return (
        gl.arange(0, WARPS, layout=w)[:, None, None, None],
        gl.arange(0, 8, layout=g)[None, :, None, None],
        gl.arange(0, 4, layout=t)[None, None, :, None],
        gl.arange(0, 4, layout=r)[None, None, None, :],
    )


@gluon.jit
def fetch(at, OFFSET: gl.constexpr, WIDTH: gl.constexpr):
    """Four words at the addresses `at` + OFFSET bytes, WIDTH of them side by side."""
    return gl.inline_asm_elementwise(
        ptx.load(OFFSET, WIDTH), ptx.constraints("r", "l"), [at], gl.int32, False, 4
    )


@gluon.jit
def fetch_keys(head, step, KIND: gl.constexpr, HALF: gl.constexpr, TILES: gl.constexpr):
    """Codes of the keys of a step: for each tile of 16 and each plane the words of two slots."""
    ROW: gl.constexpr = HALF * ptx.planes(KIND)
    at = head + step.to(gl.int64) * (16 * TILES * ROW)
    tiles = ()
    for i in gl.static_range(TILES):
        words = ()
        for plane in gl.static_range(ptx.planes(KIND)):
            if HALF == 64:
                words += (fetch(at, 2 * i * ROW + plane * HALF, 4),)
                words += (fetch(at, (2 * i + 1) * ROW + plane * HALF, 4),)
            else:
                words += (fetch(at, 2 * i * ROW + plane * HALF, 2),)
        tiles += (words,)
    return tiles


@gluon.jit
def fetch_values(head, step, KIND: gl.constexpr, HALF: gl.constexpr, TILES: gl.constexpr):
    """Codes of the values of a step: for each tile and plane tokens a, b and tokens c, d."""
    ROW: gl.constexpr = HALF * ptx.planes(KIND)
    at = head + step.to(gl.int64) * (16 * TILES * ROW)
    tiles = ()
    for i in gl.static_range(TILES):
        words = ()
        for plane in gl.static_range(ptx.planes(KIND)):
            if HALF == 64:
                words += (fetch(at, 2 * i * ROW + plane * HALF, 2),)
                words += (fetch(at, (2 * i + 1) * ROW + plane * HALF, 2),)
            else:
                words += (fetch(at, 2 * i * ROW + plane * HALF, 1),)
        tiles += (words,)
    return tiles


@gluon.jit
def token_pairs(at, i: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr):
    """Scales (or offsets) of the 32 tokens of tiles i and i + 1."""
    if GROUPS == 2:
        words = (fetch(at, 8 * i, 4), fetch(at, SLOTS * 4 + 8 * i, 4))
    else:
        words = (fetch(at, 4 * i, 2),)
    return words


@gluon.jit
def fetch_tokens(scale_at, offset_at, GROUPS: gl.constexpr, TILES: gl.constexpr):
    """(scales, offsets) of the tokens of a step, for each pair of tiles."""
    pairs = ()
    for i in gl.static_range(0, TILES, 2):
        scale = token_pairs(scale_at, i, 2 * TILES, GROUPS)
        pairs += ((scale, token_pairs(offset_at, i, 2 * TILES, GROUPS)),)
    return pairs


@gluon.jit
def folded(q, scale_at, offset_at, KIND: gl.constexpr, HALF: gl.constexpr):
    """Queries times the scales of a group, and times its offsets: (q', q o), quads by halves."""
    PARTS: gl.constexpr = HALF // 32
    scaled = ()
    shifted = ()
    for n in gl.static_range(2 * PARTS):
        scale = fetch(scale_at, 2 * (n // PARTS * HALF + n % PARTS * 8), 4)
        offset = fetch(offset_at, 2 * (n // PARTS * HALF + n % PARTS * 8), 4)
        a, b = gl.inline_asm_elementwise(
            ptx.fold(KIND), ptx.constraints("rr", "rrr"), [q[n], scale, offset], (gl.int32, gl.int32),
            True, 4,
        )  # fmt: skip
        scaled += (a,)
        shifted += (b,)
    return scaled, shifted


@gluon.jit
def over_keys(x, COMBINE: gl.constexpr):
    """Maximum or sum over all keys of a warp of quads of scores: (a, b, a, b)."""
    return gl.inline_asm_elementwise(
        ptx.over_keys(COMBINE, len(x)), ptx.constraints("f", "f" * len(x)), x, gl.float32, True, 4
    )


@gluon.jit
def scores_of(scaled, shifted, words, KIND: gl.constexpr, HALF: gl.constexpr):
    """(scores of each tile of 16 keys but for a constant of each column, that constant)."""
    PARTS: gl.constexpr = HALF // 32
    shift = gl.inline_asm_elementwise(
        ptx.shift_of(KIND, PARTS), ptx.constraints("f", "r" * (4 * PARTS)), scaled + shifted, gl.float32,
        True, 4,
    )  # fmt: skip
    s = ()
    for i in gl.static_range(len(words)):
        args = scaled + words[i]
        s += (
            gl.inline_asm_elementwise(
                ptx.scores(KIND, PARTS), ptx.constraints("f", "r" * len(args)), args, gl.float32, True, 4
            ),
        )
    return s, shift


@gluon.jit
def masked(s, key, low, high):
    """Scores, -inf where a column does not see a key; `key` is that of slot 0 of a lane."""
    seen = ()
    for i in gl.static_range(len(s)):
        k_pos = key + 2 * i
        seen += (gl.where((k_pos >= low) & (k_pos < high), s[i], float("-inf")),)
    return seen


@gluon.jit
def scaled_by(acc, shrink):
    """Sums times what shrinks them."""
    scaled = ()
    for i in gl.static_range(len(acc)):
        scaled += (acc[i] * shrink,)
    return scaled


@gluon.jit
def spread(sums, HALF_NUMBER: gl.constexpr):
    """What belongs to one half of the channels, (a, b), as (a, b, a, b)."""
    return gl.inline_asm_elementwise(
        ptx.spread(HALF_NUMBER), ptx.constraints("f", "f"), [sums], gl.float32, True, 4
    )


@gluon.jit
def weighed(acc, weights, words, KIND: gl.constexpr, HALF: gl.constexpr):
    """Sums plus weights times the codes of 16 tokens."""
    PARTS: gl.constexpr = HALF // 32
    args = words + (weights,) + acc
    return gl.inline_asm_elementwise(
        ptx.weigh(KIND, PARTS),
        ptx.constraints("f" * (4 * PARTS), "r" * (len(words) + 1) + "f" * (4 * PARTS)),
        args,
        (gl.float32,) * (4 * PARTS),
        True,
        4,
    )


@gluon.jit
def taken(acc, sums, p, tokens, words, KIND: gl.constexpr, HALF: gl.constexpr,
          GROUPS: gl.constexpr):  # fmt: skip
    """(acc, sums) with the values of a step: weights p, scales and offsets of `tokens`."""
    for i in gl.static_range(0, len(p), 2):
        scale, offset = tokens[i // 2]
        args = (p[i], p[i + 1]) + scale + offset + (sums,)
        first, second, sums = gl.inline_asm_elementwise(
            ptx.weights(KIND, GROUPS),
            ptx.constraints("rrf", "ff" + "r" * (2 * len(scale)) + "f"),
            args,
            (gl.int32, gl.int32, gl.float32),
            True,
            4,
        )
        acc = weighed(acc, first, words[i], KIND, HALF)
        acc = weighed(acc, second, words[i + 1], KIND, HALF)
    return acc, sums


@gluon.jit
def softmax_step(s, shift, m, l, unit):
    """Take scores into the running maximum and sum: (weights raised by 2^8, m, l, shrink)."""
    m_new = gl.maximum(m, over_keys(s, "max") + shift)
    shrink = gl.exp2((m - m_new) * unit)
    start = (m_new - shift) * unit - RAISED
    p = ()
    l = l * shrink
    for i in gl.static_range(len(s)):
        weight = gl.exp2(s[i] * unit - start)
        p += (weight,)
        l += weight
    return p, m_new, l, shrink


@gluon.jit
def address(plane, b, kv_head):
    """Where a head begins, as a number."""
    at = plane.ptr + b * plane.batch + kv_head.to(gl.int64) * plane.head
    return at.to(gl.int64)


@gluon.jit
def extent(bounds, b, kv_head, k_len, q_offset):
    """(keys, position of the first query) of a row, where they differ over the batch."""
    if bounds.offsets is not None:
        q_offset = gl.load(bounds.offsets + b).to(gl.int32)
    if bounds.lengths is not None:
        at = b * bounds.lengths_batch + kv_head * bounds.lengths_head
        k_len = gl.minimum(k_len, gl.load(bounds.lengths + at).to(gl.int32))
    return k_len, q_offset


@gluon.jit
def load_queries(q_at, BFLOAT: gl.constexpr, HALF: gl.constexpr):
    """The queries of row g in float16, of the channels that lane t meets in keys: quads by halves."""
    PARTS: gl.constexpr = HALF // 32
    queries = ()
    for n in gl.static_range(2 * PARTS):
        words = fetch(q_at, 2 * (n // PARTS * HALF + n % PARTS * 8), 4)
        if BFLOAT:
            words = gl.inline_asm_elementwise(
                ptx.to_half(), ptx.constraints("r", "r"), [words], gl.int32, True, 4
            )
        queries += (words,)
    return queries


@gluon.jit
def real_scales(tokens, token, k_len, SLOTS: gl.constexpr, GROUPS: gl.constexpr):
    """Scales and offsets, 0 for tokens that do not exist; `token` is the first of each quad."""
    kept = ()
    for i in gl.static_range(len(tokens)):
        both = ()
        for part in gl.static_range(2):
            words = ()
            for n in gl.static_range(GROUPS):
                x = tokens[i][part][n]
                here = token + 4 * i + n * SLOTS
                if GROUPS == 2:
                    x = gl.where(here < k_len, x, 0)
                else:
                    x = gl.where(here + 1 < k_len, x, gl.where(here < k_len, x & 0xFFFF, 0))
                words += (x,)
            both += (words,)
        kept += (both,)
    return kept


@gluon.jit
def real_codes(words, token, k_len, HALF: gl.constexpr):
    """Codes of values, 0 for tokens that do not exist (fp8 codes there might be nan)."""
    kept = ()
    for i in gl.static_range(len(words)):
        tile = ()
        for n in gl.static_range(len(words[i])):
            here = token + 2 * i + (n % 2 if HALF == 64 else 0)
            tile += (gl.where(here < k_len, words[i][n], 0),)
        kept += (tile,)
    return kept


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def codes_kernel(
    q, k_codes, k_scale, k_offset, v_codes, v_scale, v_offset, out, lse, bounds, window, scale,
    q_len, k_len, q_offset, splits, out_split, lse_split, kv_heads, groups,
    D: gl.constexpr, KIND_K: gl.constexpr, KIND_V: gl.constexpr, K_GROUP: gl.constexpr,
    V_GROUPS: gl.constexpr, TILES: gl.constexpr, CAUSAL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split of the keys, for eight rows of one KV head."""
    HALF: gl.constexpr = D // 2
    PARTS: gl.constexpr = HALF // 32
    K_ROW: gl.constexpr = HALF * ptx.planes(KIND_K)
    V_ROW: gl.constexpr = HALF * ptx.planes(KIND_V)
    SLOTS: gl.constexpr = 2 * TILES  # keys of a lane: g * SLOTS onwards
    KEYS: gl.constexpr = 8 * SLOTS
    tile = gl.program_id(0) // splits
    split = gl.program_id(0) % splits
    b = (gl.program_id(1) // kv_heads).to(gl.int64)
    kv_head = gl.program_id(1) % kv_heads
    k_len, q_offset = extent(bounds, b, kv_head, k_len, q_offset)
    w, g, t, r = places(WARPS)
    whole = w * 0 + g * 0 + t * 0 + r * 0  # every tensor that registers hold has its shape

    # Row n of the product is query n // groups of head n % groups; missing rows repeat the last.
    rows = groups * q_len
    row = gl.minimum(tile * ROWS + g + whole, rows - 1)
    h = kv_head * groups + row % groups
    index = row // groups
    q_at = q.ptr + b * q.batch + h.to(gl.int64) * q.head + index.to(gl.int64) * q.row
    queries = load_queries(
        q_at.to(gl.int64) + t * HALF // 2, q.ptr.dtype.element_ty == gl.bfloat16, HALF
    )

    # Columns 2t, 2t + 1 of scores and sums are rows of queries too: what do they see?
    column = tile * ROWS + 2 * t + r % 2 + whole
    q_pos = q_offset + gl.minimum(column, rows - 1) // groups
    high = whole + k_len
    low = whole
    first_q = q_offset + tile * ROWS // groups
    last_q = q_offset + gl.minimum(tile * ROWS + ROWS - 1, rows - 1) // groups
    stop, full_stop = k_len, k_len
    first, full_first = 0, 0
    if CAUSAL:
        high = gl.minimum(high, q_pos + 1)
        stop = gl.minimum(k_len, last_q + 1)
        full_stop = gl.minimum(k_len, first_q + 1)
    if window is not None:
        low = gl.maximum(q_pos - window + 1, 0)
        first = gl.minimum(gl.maximum(first_q - window + 1, 0), gl.maximum(stop, 0)) // KEYS
        full_first = gl.maximum(last_q - window + 1, 0)
    stop = gl.maximum(stop, 0)
    last = (stop + KEYS - 1) // KEYS
    count = last - first
    each = (count + splits - 1) // splits
    begin = first + gl.minimum(split * each, count)
    end = first + gl.minimum((split + 1) * each, count)

    k_at = address(k_codes, b, kv_head) + whole
    v_at = address(v_codes, b, kv_head) + whole
    if HALF == 64:
        k_at += SLOTS * g * K_ROW + 16 * t
        code_token = SLOTS * (2 * t + r // 2) + whole
        v_at += code_token * V_ROW + 8 * g
    else:
        k_at += (SLOTS * g + r // 2) * K_ROW + 8 * t
        code_token = SLOTS * (2 * t + r % 2) + r // 2 + whole
        v_at += code_token * V_ROW + 4 * g
    if V_GROUPS == 2:
        token = SLOTS * 2 * t + r + whole
        token_at = SLOTS * 2 * t * 4 + whole
    else:
        token = SLOTS * (2 * t + r // 2) + 2 * (r % 2) + whole
        token_at = SLOTS * (2 * t + r // 2) * 2 + whole
    k_scale_at = address(k_scale, b, kv_head) + HALF // 2 * t + whole
    k_offset_at = address(k_offset, b, kv_head) + HALF // 2 * t + whole
    v_scale_at = address(v_scale, b, kv_head) + token_at
    v_offset_at = address(v_offset, b, kv_head) + token_at

    unit = scale * LOG2E
    zero = whole.to(gl.float32)
    m = zero + LOWEST
    l = zero
    sums = zero
    acc = (zero,) * (4 * PARTS)
    # A warp whose share has ended repeats the last step of the program and sees nothing.
    step = gl.minimum(begin + w + whole, gl.maximum(end - 1, 0))
    k_words = fetch_keys(k_at, step, KIND_K, HALF, TILES)
    v_words = fetch_values(v_at, step, KIND_V, HALF, TILES)
    for at in range(begin, end, WARPS):
        group = (step * KEYS // K_GROUP).to(gl.int64) * (2 * D)
        scaled, shifted = folded(queries, k_scale_at + group, k_offset_at + group, KIND_K, HALF)
        ahead = step.to(gl.int64) * (KEYS * 2 * V_GROUPS)
        tokens = fetch_tokens(v_scale_at + ahead, v_offset_at + ahead, V_GROUPS, TILES)
        s, shift = scores_of(scaled, shifted, k_words, KIND_K, HALF)
        step = gl.minimum(at + WARPS + w + whole, end - 1)
        k_words = fetch_keys(k_at, step, KIND_K, HALF, TILES)
        key = at * KEYS
        if (at + WARPS > end) | (key < full_first) | (key + WARPS * KEYS > full_stop):
            mine = at + w + whole
            first_key = mine * KEYS
            s = masked(s, gl.where(mine < end, first_key + SLOTS * g + r // 2, -1), low, high)
            tokens = real_scales(tokens, first_key + token, k_len, SLOTS, V_GROUPS)
            if KIND_V == "fp8":
                v_words = real_codes(v_words, first_key + code_token, k_len, HALF)
        p, m, l, shrink = softmax_step(s, shift, m, l, unit)
        acc = scaled_by(acc, shrink)
        acc, sums = taken(acc, sums * shrink, p, tokens, v_words, KIND_V, HALF, V_GROUPS)
        v_words = fetch_values(v_at, step, KIND_V, HALF, TILES)
    l = over_keys((l,), "add")
    top = gl.max(m, axis=0)[None]
    share = gl.exp2((m - top) * unit) + whole
    total = gl.sum(l * share, axis=0)
    empty = total == 0
    safe = gl.where(empty, 1.0, total)
    J: gl.constexpr = gl.SliceLayout(0, quads(WARPS))
    column = gl.convert_layout(gl.max(column, axis=0), J)
    h = kv_head * groups + column % groups
    index = column // groups
    keep = column < rows
    to = out.ptr + split.to(gl.int64) * out_split + b * out.batch
    to = to + h.to(gl.int64) * out.head + index.to(gl.int64) * out.row
    channel = gl.max(g * (HALF // 8) + r // 2 + whole, axis=0)
    for n in gl.static_range(4 * PARTS):
        of_half = spread(sums, n // (2 * PARTS))
        joined = gl.sum((acc[n] + of_half) * share, axis=0) / safe
        joined = joined.to(out.ptr.dtype.element_ty)
        gl.store(to + channel + n // (2 * PARTS) * HALF + n % (2 * PARTS) * 2, joined, mask=keep)
    lse_at = lse + split.to(gl.int64) * lse_split + (b * kv_heads * groups + h) * q_len + index
    found = (gl.max(m, axis=0) * unit + gl.log2(safe) - RAISED) * LN2
    gl.store(lse_at, gl.where(empty, float("-inf"), found), mask=keep & (channel == 0))
