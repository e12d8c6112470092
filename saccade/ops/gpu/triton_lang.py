"""Device functions that the Triton kernels share: ranges of tiles, visibility, scores, softmax.

Records of pointers and numbers travel into kernels as named tuples; a field that is None is known
at compile time, so a kernel without a window, bias or padding holds no trace of them.

Weights are computed as `exp2(score * unit - max * unit)`: one multiply-add and one exp2 an element.
Without softcap and bias a score is the raw product q.k and `unit` carries scale * log2(e); with
them, scores are in powers of two already and `unit` is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A first running maximum below every score, yet finite: a difference of two of them is 0, not nan.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def extent(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset):
    """Which rows a tile belongs to: (first query, first key, q_len, k_len, offset, tile in row)."""
    q_first = tl.cast(0, tl.int64)
    k_first = tl.cast(0, tl.int64)
    if seqlen_info.document is not None:
        document = tl.load(seqlen_info.document + tile)
        known = document >= 0
        at = tl.maximum(document, 0)
        q_first = tl.load(seqlen_info.cu_q + at).to(tl.int64)
        k_first = tl.load(seqlen_info.cu_k + at).to(tl.int64)
        q_len = tl.where(known, tl.load(seqlen_info.cu_q + at + 1) - q_first, 0).to(tl.int32)
        k_len = (tl.load(seqlen_info.cu_k + at + 1) - k_first).to(tl.int32)
        tile = tile - tl.load(seqlen_info.first_tile + at)
        q_offset = k_len - q_len
    if seqlen_info.offsets is not None:
        q_offset = tl.load(seqlen_info.offsets + b).to(tl.int32)
    if seqlen_info.kv_lens is not None:
        at = b * seqlen_info.kv_lens_batch + kv_head * seqlen_info.kv_lens_head
        k_len = tl.minimum(k_len, tl.load(seqlen_info.kv_lens + at).to(tl.int32))
    if seqlen_info.origin is not None:
        origin = tl.load(seqlen_info.origin).to(tl.int32)
        k_len = k_len - origin
        q_offset = q_offset - origin
    return q_first, k_first, q_len, k_len, q_offset, tile


@triton.jit
def key_tiles(first_q, last_q, k_len, mask_args, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Key tiles that queries see: (sink tiles, first, full from, full to, stop).

    Tiles [0, sinks) and [first, stop) are visited; every query sees all of [full from, full to).
    """
    stop = k_len
    full_stop = k_len
    if CAUSAL:
        stop = tl.minimum(k_len, last_q + 1)
        full_stop = tl.minimum(k_len, first_q + 1)
    stop = tl.maximum(stop, 0)
    first = 0
    full_first = 0
    num_sinks = 0
    if mask_args.window is not None:
        first = tl.minimum(tl.maximum(first_q - mask_args.window + 1, 0), stop) // BLOCK
        full_first = tl.maximum(last_q - mask_args.window + 1, 0)
        if mask_args.sinks is not None:
            num_sinks = tl.minimum(tl.cdiv(tl.minimum(mask_args.sinks, stop), BLOCK), first)
    last = tl.cdiv(stop, BLOCK)
    full_to = tl.maximum(full_stop, 0) // BLOCK
    if (mask_args.padding is not None) or (mask_args.foreign is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return num_sinks, first, full_from, full_to, last


@triton.jit
def query_tiles(
    first_k, last_k, q_len, q_offset, mask_args, CAUSAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Query tiles that see keys first_k .. last_k: (first, full from, full to, stop)."""
    first = 0
    full_first = 0
    stop = q_len
    full_stop = q_len
    if CAUSAL:
        first = tl.maximum(first_k - q_offset, 0)
        full_first = tl.maximum(last_k - q_offset, 0)
    if mask_args.window is not None:
        reach = tl.minimum(tl.maximum(last_k + mask_args.window - q_offset, 0), q_len)
        full_stop = tl.minimum(tl.maximum(first_k + mask_args.window - q_offset, 0), q_len)
        if mask_args.sinks is not None:
            reach = tl.where(first_k < mask_args.sinks, q_len, reach)
            full_stop = tl.where(last_k < mask_args.sinks, q_len, full_stop)
        stop = reach
    first = tl.minimum(first, stop) // BLOCK
    last = tl.cdiv(stop, BLOCK)
    full_to = full_stop // BLOCK
    if (mask_args.padding is not None) or (mask_args.foreign is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return first, full_from, full_to, last


@triton.jit
def tile_with_holes(i, num_sinks, first, full_from, full_to):
    """The i-th of the visited key tiles that are not full: sink tiles, left edge, right edge."""
    tile = i - num_sinks + first
    tile = tl.where(tile >= full_from, tile + full_to - full_from, tile)
    return tl.where(i < num_sinks, i, tile)


@triton.jit
def block_list_at(block_lists, b, kv_head, row):
    """Where a row of tiles has its list: (pointer, full tiles, tiles in all)."""
    at = b * block_lists.batch + kv_head * block_lists.head + row.to(tl.int64) * block_lists.row
    count = block_lists.counts + 2 * (at // block_lists.row)
    return block_lists.tiles + at, tl.load(count), tl.load(count + 1)


@triton.jit
def addresses(ptr, rows, row_stride, dims):
    """Pointers to the elements of a tile, `rows` counted from `ptr`; 64-bit throughout."""
    return ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]


@triton.jit
def load_tile(at, keep, dims, DIM: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows; rows outside `keep` (where MASKED) and padded dimensions are 0, unread."""
    if MASKED:
        return tl.load(at, mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)
    if DIM != dims.shape[0]:
        return tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def real_keys(mask_args, b, k_pos, k_len):
    """Keys that exist: inside the row, and not padding.  The rest is never read."""
    real = (k_pos >= 0) & (k_pos < k_len)
    if mask_args.padding is not None:
        seen = tl.load(mask_args.padding + b * mask_args.padding_row + k_pos, mask=real, other=0)
        real = real & (seen != 0)
    return real


@triton.jit
def visible(mask_args, b, h, kv_head, q_index, q_pos, k_pos, real, q_real, CAUSAL: tl.constexpr):
    """Who sees whom in one tile: `q_index`, `q_pos`, `q_real` are columns, `k_pos`, `real` rows.

    `h` is the query head, a number or a column.
    """
    see = real & q_real
    distance = q_pos - k_pos
    if CAUSAL:
        see = see & (distance >= 0)
    if mask_args.window is not None:
        near = distance < mask_args.window
        if mask_args.sinks is not None:
            near = near | (k_pos < mask_args.sinks)
        see = see & near
    if mask_args.allowed is not None:
        row = mask_args.allowed + b * mask_args.allowed_batch + kv_head * mask_args.allowed_head
        row += (q_index // mask_args.q_block).to(tl.int64) * mask_args.allowed_row
        see = see & (tl.load(row + k_pos // mask_args.k_block, mask=see, other=0) != 0)
    if mask_args.foreign is not None:
        row = mask_args.foreign + b * mask_args.foreign_batch + h * mask_args.foreign_head
        row += q_index.to(tl.int64) * mask_args.foreign_row
        see = see & (tl.load(row + k_pos, mask=see, other=0) != 0)
    return see


@triton.jit
def scores_of(qk, score_args, slope, q_pos, k_pos, RAW: tl.constexpr):
    """Scores of one tile from the products q.k, in the units of the module's first lines."""
    if RAW:
        return qk
    s = qk * (score_args.scale * LOG2E)
    if score_args.softcap is not None:
        cap = score_args.softcap * LOG2E
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor needs a library.
        s = cap * (1 - 2 / (tl.exp2(s * (2 * LOG2E / cap)) + 1))
    if score_args.slopes is not None:
        s = s - slope * LOG2E * tl.abs(q_pos - k_pos).to(tl.float32)
    return s


@triton.jit
def softcap_slope(qk, score_args):
    """Derivative of the softcap at the products q.k: 1 - tanh(x)^2."""
    t = 1 - 2 / (tl.exp2(qk * (score_args.scale * 2 * LOG2E / score_args.softcap)) + 1)
    return 1 - t * t


@triton.jit
def unit_of(score_args, RAW: tl.constexpr):
    """Factor from scores to powers of two."""
    return score_args.scale * LOG2E if RAW else 1.0


@triton.jit
def online_softmax(m, l, s, unit):
    """Take a tile of scores into the running maximum and sum: (m, l, weights, shrink)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * unit - (m_new * unit)[:, None])
    shrink = tl.exp2((m - m_new) * unit)
    return m_new, l * shrink + tl.sum(p, 1), p, shrink


@triton.jit
def finish(m, l, acc, unit, sink):
    """(output, lse) of a row of tiles; `sink` is the learned logit or None."""
    # Where nothing was seen, m * unit is huge; two roundings of it must never be subtracted.
    top = tl.where(l == 0, LOWEST, m * unit)
    if sink is not None:
        raised = tl.maximum(top, sink * LOG2E)
        shrink = tl.exp2(top - raised)
        l = l * shrink + tl.exp2(sink * LOG2E - raised)
        acc = acc * shrink[:, None]
        top = raised
    empty = l == 0
    safe = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN2)
    return acc / safe[:, None], lse
