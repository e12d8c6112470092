"""Decoding over quantised keys and values on Hopper: every warp for itself, codes in registers.

Codes go from memory into the registers where the matrix units want them (gluon_codes_fetch), and
become numbers there (gluon_codes_ptx); nothing passes through shared memory until the warps of a
program join their sums.  In one step a warp takes 32 or 64 keys:

    q' = q * scale of the group's channels         scores^T = codes q'^T + (q . offset)
    p  = exp2(scores - max)                        w = p * scale of each token
    sums^T = codes^T w^T + (p . offsets)

Keys (and channels of values) are rows of the products, so up to eight rows of queries times heads
cost one product.  The next step's codes are asked for as soon as this one's are used.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attend import gluon_codes_ptx as ptx
from saccade.ops.attend.gluon_codes_fetch import (
    address,
    ask_early,
    fetch_channels,
    fetch_codes,
    fetch_tokens,
    load_queries,
    places,
    quads,
    real_codes,
    real_scales,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2, LOWEST = gl.constexpr(0.6931471805599453), gl.constexpr(-1e30)
# Weights times scales are small: 2^8 times as large, they stay clear of float16's denormal numbers.
RAISED = gl.constexpr(8.0)
ROWS = gl.constexpr(8)  # of queries times heads, in a product


@gluon.jit
def folded(q, scale, KIND: gl.constexpr):
    """Queries times the scales of a group, in the order of the codes."""
    words = ()
    for n in gl.static_range(len(q)):
        words += (
            gl.inline_asm_elementwise(
                ptx.fold(KIND), ptx.constraints("r", "rr"), [q[n], scale[n]], gl.int32, True, 4
            ),
        )
    return words


@gluon.jit
def over_keys(x, COMBINE: gl.constexpr):
    """Maximum or sum over all keys of a warp of quads of scores: (a, b, a, b)."""
    return gl.inline_asm_elementwise(
        ptx.over_keys(COMBINE, len(x)), ptx.constraints("f", "f" * len(x)), x, gl.float32, True, 4
    )


@gluon.jit
def scores_of(q, scale, offset, words, KIND: gl.constexpr, HALF: gl.constexpr):
    """(scores of each tile of 16 keys but for a constant of each column, that constant)."""
    PARTS: gl.constexpr = HALF // 32
    scaled = folded(q, scale, KIND)
    shift = gl.inline_asm_elementwise(
        ptx.shift_of(KIND, PARTS),
        ptx.constraints("f", "r" * (8 * PARTS)),
        scaled + q + scale + offset,
        gl.float32,
        True,
        4,
    )
    s = ()
    for i in gl.static_range(len(words)):
        args = scaled + words[i]
        s += (
            gl.inline_asm_elementwise(
                ptx.scores(KIND, PARTS),
                ptx.constraints("f", "r" * len(args)),
                args,
                gl.float32,
                True,
                4,
            ),
        )
    return s, shift


@gluon.jit
def masked(s, key, low, high):
    """Scores, -inf where a column does not see a key; `key` is that of a lane's first slots."""
    seen = ()
    for i in gl.static_range(len(s)):
        k_pos = key + 4 * i
        seen += (gl.where((k_pos >= low) & (k_pos < high), s[i], float("-inf")),)
    return seen


@gluon.jit
def taken(acc, shrink, p, tokens, words, KIND: gl.constexpr, HALF: gl.constexpr,
          GROUPS: gl.constexpr):  # fmt: skip
    """acc shrink + the values of a step with weights p, scales and offsets of `tokens`."""
    sums = shrink * 0
    weights = ()
    codes = ()
    for i in gl.static_range(0, len(p), 2):
        scale, offset = tokens[i // 2]
        first, second, sums = gl.inline_asm_elementwise(
            ptx.weights(KIND, GROUPS),
            ptx.constraints("rrf", "ff" + "r" * (2 * GROUPS) + "f"),
            (p[i], p[i + 1]) + scale + offset + (sums,),  # noqa: RUF005
            (gl.int32, gl.int32, gl.float32),
            True,
            4,
        )
        weights += (first, second)
        codes += words[i] + words[i + 1]
    return gl.inline_asm_elementwise(
        ptx.weigh(KIND, HALF // 32, len(p)),
        ptx.constraints("f" * len(acc), "r" * (len(codes) + len(p)) + "f" * (len(acc) + 2)),
        codes + weights + (sums, shrink) + acc,
        (gl.float32,) * len(acc),
        True,
        4,
    )


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
def extent(bounds, b, kv_head, k_len, q_offset):
    """(keys, position of the first query) of a row, where they differ over the batch."""
    if bounds.offsets is not None:
        q_offset = gl.load(bounds.offsets + b).to(gl.int32)
    if bounds.lengths is not None:
        at = b * bounds.lengths_batch + kv_head * bounds.lengths_head
        k_len = gl.minimum(k_len, gl.load(bounds.lengths + at).to(gl.int32))
    return k_len, q_offset


@gluon.jit
def join(acc, m, l, unit, out, lse, split, tile, out_split, lse_split, b, kv_head, q_len,
         HALF: gl.constexpr, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr,
         WARPS: gl.constexpr):  # fmt: skip
    """Write what the warps of a program found together: through shared memory, once.

    There a warp holds some of the quads, of all warps: `[quads, warps, g 8, t 4, registers 4]`.
    """
    QUADS: gl.constexpr = HALF // 8
    SHARE: gl.constexpr = max(QUADS // WARPS, 1)
    ALL: gl.constexpr = gl.BlockedLayout(
        [SHARE, WARPS, 1, 1, 4], [1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    ONE: gl.constexpr = gl.SliceLayout(0, ALL)  # [warps, 8, 4, 4]
    FLAT: gl.constexpr = gl.BlockedLayout(
        [SHARE * WARPS, 1, 1, 4], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]
    )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    stacked = gl.join(gl.join(acc[0], acc[1]), gl.join(acc[2], acc[3]))
    if QUADS == 8:
        more = gl.join(gl.join(acc[4], acc[5]), gl.join(acc[6], acc[7]))
        stacked = gl.join(stacked, more).permute((6, 5, 4, 0, 1, 2, 3))
    else:
        stacked = stacked.permute((5, 4, 0, 1, 2, 3))
    sums = gl.allocate_shared_memory(
        gl.float32, [QUADS * WARPS, 8, 4, 4], plain, stacked.reshape([QUADS * WARPS, 8, 4, 4])
    )
    both = gl.join(m, l).permute((4, 0, 1, 2, 3)).reshape([2 * WARPS, 8, 4, 4])
    rows = gl.allocate_shared_memory(gl.float32, [2 * WARPS, 8, 4, 4], plain, both)
    m = rows.slice(0, WARPS).load(ONE)
    top = gl.max(m, axis=0)
    share = gl.exp2((m - gl.expand_dims(top, 0)) * unit)
    total = gl.sum(rows.slice(WARPS, WARPS).load(ONE) * share, axis=0)
    F: gl.constexpr = gl.SliceLayout(1, ALL)
    total = gl.convert_layout(total, gl.SliceLayout(0, F))
    top = gl.convert_layout(top, gl.SliceLayout(0, F))
    empty = total == 0
    safe = gl.where(empty, 1.0, total)
    parts = gl.convert_layout(sums.load(FLAT).reshape([QUADS, WARPS, 8, 4, 4]), ALL)
    joined = gl.sum(parts * gl.expand_dims(share, 0), axis=1)  # [quads, 8, 4, 4]
    joined = joined / gl.expand_dims(safe, 0)

    n_at, g, t, r = places(QUADS, F)
    channel = n_at // (QUADS // 2) * HALF + n_at % (QUADS // 2) * 2 + g * (HALF // 8) + r // 2
    column = tile * ROWS + 2 * t + r % 2
    keep = column < GROUPS * q_len
    h = kv_head * GROUPS + column % GROUPS
    index = column // GROUPS
    at = out.ptr + split.to(gl.int64) * out_split + b * out.batch
    at = at + h.to(gl.int64) * out.head + index.to(gl.int64) * out.row
    gl.store(at + channel, joined.to(out.ptr.dtype.element_ty), mask=keep & (channel >= 0))
    found = gl.where(empty, float("-inf"), (top * unit + gl.log2(safe) - RAISED) * LN2)
    lse_at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
    found = gl.expand_dims(found, 0) + channel * 0.0
    gl.store(lse_at + channel * 0, found, mask=keep & (channel == 0))


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def codes_kernel(
    q, k_codes, k_scale, k_offset, v_codes, v_scale, v_offset, out, lse, bounds, window, scale,
    q_len, k_len, q_offset, out_split, lse_split, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr,
    D: gl.constexpr, KIND_K: gl.constexpr, KIND_V: gl.constexpr, K_GROUP: gl.constexpr,
    V_GROUPS: gl.constexpr, TILES: gl.constexpr, CAUSAL: gl.constexpr, WARPS: gl.constexpr,
    AHEAD: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split of the keys, for eight rows of one KV head."""
    HALF: gl.constexpr = D // 2
    PARTS: gl.constexpr = HALF // 32
    K_ROW: gl.constexpr = HALF * ptx.planes(KIND_K)
    V_ROW: gl.constexpr = HALF * ptx.planes(KIND_V)
    SLOTS: gl.constexpr = 2 * TILES  # keys of a lane
    KEYS: gl.constexpr = 8 * SLOTS
    split = gl.program_id(0)
    splits = gl.num_programs(0)
    tile = gl.program_id(1)
    b = (gl.program_id(2) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(2) % KV_HEADS
    if EARLY:
        gl.inline_asm_elementwise(ptx.begin_early(), "=r", [], gl.int32, False, 1)
    k_len, q_offset = extent(bounds, b, kv_head, k_len, q_offset)
    w, g, t, r = places(WARPS, quads(WARPS))
    whole = w * 0 + g * 0 + t * 0 + r * 0  # every tensor that registers hold has its shape

    # Row n of the product is query n // GROUPS of head n % GROUPS; missing rows repeat the last.
    rows = GROUPS * q_len
    row = gl.minimum(tile * ROWS + g + whole, rows - 1)
    h = kv_head * GROUPS + row % GROUPS
    index = row // GROUPS
    q_at = q.ptr + b * q.batch + h.to(gl.int64) * q.head + index.to(gl.int64) * q.row
    # Columns 2t, 2t + 1 of scores and sums are rows of queries too: what do they see?
    column = tile * ROWS + 2 * t + r % 2 + whole
    q_pos = q_offset + gl.minimum(column, rows - 1) // GROUPS
    high = whole + k_len
    low = whole
    first_q = q_offset + tile * ROWS // GROUPS
    last_q = q_offset + gl.minimum(tile * ROWS + ROWS - 1, rows - 1) // GROUPS
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

    slot = (g // 2) * (2 * SLOTS) + g % 2 + whole
    if HALF == 64:
        k_at = address(k_codes, b, kv_head) + slot * K_ROW + 16 * t
        code_token = 2 * SLOTS * t + r // 2 + whole
        v_at = address(v_codes, b, kv_head) + code_token * V_ROW + 8 * g
    else:
        k_at = address(k_codes, b, kv_head) + (slot + r // 2 * 2) * K_ROW + 8 * t
        code_token = 2 * SLOTS * t + r + whole
        v_at = address(v_codes, b, kv_head) + code_token * V_ROW + 4 * g
    channels = HALF // 2 * t + whole
    k_scale_at = address(k_scale, b, kv_head) + channels
    k_offset_at = address(k_offset, b, kv_head) + channels
    v_scale_at = address(v_scale, b, kv_head) + 4 * SLOTS * V_GROUPS * t + whole
    v_offset_at = address(v_offset, b, kv_head) + 4 * SLOTS * V_GROUPS * t + whole
    token = 2 * SLOTS * t + (r if V_GROUPS == 2 else 2 * r) + whole
    # Lane (g, t) brings line g of what t stands for: all scales of a step.
    early_keys = gl.where(t == 0, address(k_scale, b, kv_head), address(k_offset, b, kv_head))
    early_keys = early_keys + g % (D // 64) * 128 + whole
    early_tokens = gl.where(t == 2, address(v_scale, b, kv_head), address(v_offset, b, kv_head))
    early_tokens = early_tokens + g % max(KEYS * V_GROUPS // 64, 1) * 128 + whole

    unit = scale * LOG2E
    zero = whole.to(gl.float32)
    m = zero + LOWEST
    l = zero
    acc = (zero,) * (4 * PARTS)
    # A warp whose share has ended repeats the last step of the program and sees nothing.
    step = gl.minimum(begin + w + whole, gl.maximum(end - 1, 0))
    k_words = fetch_codes(k_at, step, KIND_K, HALF, TILES, 4)
    v_words = fetch_codes(v_at, step, KIND_V, HALF, TILES, 2)
    queries = load_queries(
        q_at.to(gl.int64) + t * (HALF // 2), q.ptr.dtype.element_ty == gl.bfloat16, HALF
    )
    for at in range(begin, end, WARPS):
        group = step * KEYS // K_GROUP
        scale_words = fetch_channels(k_scale_at + group.to(gl.int64) * (2 * D), HALF)
        offset_words = fetch_channels(k_offset_at + group.to(gl.int64) * (2 * D), HALF)
        ahead = step.to(gl.int64) * (KEYS * 2 * V_GROUPS)
        tokens = fetch_tokens(v_scale_at + ahead, v_offset_at + ahead, V_GROUPS, TILES)
        step = gl.minimum(at + WARPS + w + whole, end - 1)
        if AHEAD is not None:
            keys_at = early_keys + (step * KEYS // K_GROUP).to(gl.int64) * (2 * D)
            tokens_at = early_tokens + step.to(gl.int64) * (KEYS * 2 * V_GROUPS)
            ask_early(gl.where(t < 2, keys_at, tokens_at), AHEAD)
        s, shift = scores_of(queries, scale_words, offset_words, k_words, KIND_K, HALF)
        k_words = fetch_codes(k_at, step, KIND_K, HALF, TILES, 4)
        key = at * KEYS
        if (at + WARPS > end) | (key < full_first) | (key + WARPS * KEYS > full_stop):
            mine = at + w + whole
            here = mine * KEYS
            s = masked(s, gl.where(mine < end, here + slot + r // 2 * 2, -KEYS), low, high)
            tokens = real_scales(tokens, here + token, k_len, V_GROUPS)
            if KIND_V == "fp8":
                v_words = real_codes(v_words, here + code_token, k_len, HALF)
        p, m, l, shrink = softmax_step(s, shift, m, l, unit)
        acc = taken(acc, shrink, p, tokens, v_words, KIND_V, HALF, V_GROUPS)
        v_words = fetch_codes(v_at, step, KIND_V, HALF, TILES, 2)
    join(acc, m, over_keys((l,), "add"), unit, out, lse, split, tile, out_split, lse_split, b,
         kv_head, q_len, HALF, KV_HEADS, GROUPS, WARPS)  # fmt: skip
