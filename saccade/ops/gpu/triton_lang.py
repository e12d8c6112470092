"""Device functions that attention kernels share: tile ranges, masks, scores, softmax, split-KV.

Their arguments `mask_args`, `score_args` and `seqlen_info` are the named tuples of
`gpu/kernel_args.py`: a field that is None is a compile-time constant.

Weights are computed as `exp2(score * unit - max * unit)`: one multiply-add and one exp2 an element.
Without softcap and bias (RAW) a score is the product q.k and `unit` is scale * log2(e); with them,
scores are multiplied by scale * log2(e) already and `unit` is 1.
"""

# Triton's language has no types.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: below every score, yet finite, so that LOWEST - LOWEST is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def pdl_begin(PDL: tl.constexpr):
    """Programmatic dependent launch: wait for the preceding kernel, then let the next one start.

    After the wait all preceding kernels have ended and their results are visible, so every load and
    store has to come after it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def seqlen_of(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset):
    """The sequence of a tile: (first query, first key, q_len, k_len, q_offset, tile therein)."""
    q_first = tl.cast(0, tl.int64)
    k_first = tl.cast(0, tl.int64)
    if seqlen_info.sequence is not None:
        sequence = tl.load(seqlen_info.sequence + tile)
        valid = sequence >= 0
        at = tl.maximum(sequence, 0)
        q_first = tl.load(seqlen_info.cu_q + at).to(tl.int64)
        k_first = tl.load(seqlen_info.cu_k + at).to(tl.int64)
        q_len = tl.where(valid, tl.load(seqlen_info.cu_q + at + 1) - q_first, 0).to(tl.int32)
        k_len = (tl.load(seqlen_info.cu_k + at + 1) - k_first).to(tl.int32)
        tile = tile - tl.load(seqlen_info.first_tile + at)
        q_offset = k_len - q_len
    if seqlen_info.q_offsets is not None:
        q_offset = tl.load(seqlen_info.q_offsets + b).to(tl.int32)
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
    """Key tiles that queries attend to: (sink tiles, first, full from, full to, stop).

    Tiles [0, sinks) and [first, stop) are computed; [full from, full to) of them need no mask.
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
    if (mask_args.key_padding is not None) or (mask_args.attn_mask is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return num_sinks, first, full_from, full_to, last


@triton.jit
def query_tiles(
    first_k, last_k, q_len, q_offset, mask_args, CAUSAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Query tiles that attend to keys first_k .. last_k: (first, full from, full to, stop)."""
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
    if (mask_args.key_padding is not None) or (mask_args.attn_mask is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return first, full_from, full_to, last


@triton.jit
def partial_tile(i, num_sinks, first, full_from, full_to):
    """Index of the i-th partial key tile: sink tiles, then the left edge, then the right edge."""
    tile = i - num_sinks + first
    tile = tl.where(tile >= full_from, tile + full_to - full_from, tile)
    return tl.where(i < num_sinks, i, tile)


@triton.jit
def block_list_at(block_lists, b, kv_head, row):
    """The block list of a row of tiles: (pointer, number of full tiles, number of all tiles)."""
    at = b * block_lists.batch + kv_head * block_lists.head + row.to(tl.int64) * block_lists.row
    count = block_lists.counts + 2 * (at // block_lists.row)
    return block_lists.tiles + at, tl.load(count), tl.load(count + 1)


@triton.jit
def head_pointer(strided, b, h):
    """Pointer to the first row of a head of a StridedTensor."""
    return strided.ptr + b * strided.batch + h.to(tl.int64) * strided.head


@triton.jit
def addresses(ptr, rows, row_stride, dims):
    """Pointers to the elements of a tile, `rows` counted from `ptr`; 64-bit throughout."""
    return ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]


@triton.jit
def load_tile(at, keep, dims, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile of rows; rows outside `keep` (where MASKED) and padded dimensions become 0."""
    if MASKED:
        return tl.load(at, mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)
    if DIM != dims.shape[0]:
        return tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def real_keys(mask_args, b, k_pos, k_len):
    """Mask of keys that exist: inside the sequence, and not padding.  The rest is never read."""
    real = (k_pos >= 0) & (k_pos < k_len)
    if mask_args.key_padding is not None:
        unpadded = tl.load(
            mask_args.key_padding + b * mask_args.key_padding_row + k_pos, mask=real, other=0
        )
        real = real & (unpadded != 0)
    return real


@triton.jit
def tile_mask(mask_args, b, h, kv_head, q_index, q_pos, k_pos, real, q_real, CAUSAL: tl.constexpr):
    """The attention mask of one tile, True where a query attends to a key.

    Args:
        q_index, q_pos, q_real: of the queries, as columns; `k_pos`, `real`: of the keys, as rows.
        h: the query head, a number or a column.
    """
    mask = real & q_real
    distance = q_pos - k_pos
    if CAUSAL:
        mask = mask & (distance >= 0)
    if mask_args.window is not None:
        in_window = distance < mask_args.window
        if mask_args.sinks is not None:
            in_window = in_window | (k_pos < mask_args.sinks)
        mask = mask & in_window
    if mask_args.block_mask is not None:
        row = (
            mask_args.block_mask
            + b * mask_args.block_mask_batch
            + kv_head * mask_args.block_mask_head
        )
        row += (q_index // mask_args.q_block).to(tl.int64) * mask_args.block_mask_row
        mask = mask & (tl.load(row + k_pos // mask_args.k_block, mask=mask, other=0) != 0)
    if mask_args.attn_mask is not None:
        row = mask_args.attn_mask + b * mask_args.attn_mask_batch + h * mask_args.attn_mask_head
        row += q_index.to(tl.int64) * mask_args.attn_mask_row
        mask = mask & (tl.load(row + k_pos, mask=mask, other=0) != 0)
    return mask


@triton.jit
def scores_of(qk, score_args, slope, q_pos, k_pos, RAW: tl.constexpr):
    """Scores of one tile from the products q.k, scaled as the module docstring says."""
    if RAW:
        return qk
    s = qk * (score_args.scale * LOG2E)
    if score_args.softcap is not None:
        cap = score_args.softcap * LOG2E
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor needs a library.
        s = cap * (1 - 2 / (tl.exp2(s * (2 * LOG2E / cap)) + 1))
    if score_args.alibi_slopes is not None:
        s = s - slope * LOG2E * tl.abs(q_pos - k_pos).to(tl.float32)
    return s


@triton.jit
def softcap_gradient(qk, score_args):
    """Derivative of the softcap at the products q.k: 1 - tanh(x)^2."""
    t = 1 - 2 / (tl.exp2(qk * (score_args.scale * 2 * LOG2E / score_args.softcap)) + 1)
    return 1 - t * t


@triton.jit
def unit_of(score_args, RAW: tl.constexpr):
    """Factor from scores to exponents of two."""
    return score_args.scale * LOG2E if RAW else 1.0


@triton.jit
def online_softmax(m, l, s, unit):
    """Update the running maximum and sum by a tile of scores: (m, l, weights, rescaling of acc)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * unit - (m_new * unit)[:, None])
    rescale = tl.exp2((m - m_new) * unit)
    return m_new, l * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def finish(m, l, acc, unit, sink):
    """Final (output, lse) of a query tile; `sink` is the learned logit or None."""
    # Where every key is masked, m * unit is huge; two roundings of it must never be subtracted.
    top = tl.where(l == 0, LOWEST, m * unit)
    if sink is not None:
        with_sink = tl.maximum(top, sink * LOG2E)
        rescale = tl.exp2(top - with_sink)
        l = l * rescale + tl.exp2(sink * LOG2E - with_sink)
        acc = acc * rescale[:, None]
        top = with_sink
    empty = l == 0
    safe = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN2)
    return acc / safe[:, None], lse


@triton.jit
def split_range(split, splits, first, last, num_sinks):
    """The share of one split, as a range of the list of tiles: sinks + [first, last)."""
    count = num_sinks + last - first
    each = tl.cdiv(count, splits)
    return tl.minimum(split * each, count), tl.minimum((split + 1) * each, count)


@triton.jit
def store_split(
    m, l, acc, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len, q_real,
    heads, value_dims, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Store the output and lse of a split; only the first split adds the learned sink."""
    if score_args.sink_logits is not None:
        sink = tl.load(score_args.sink_logits + h, mask=q_real & (split == 0), other=float("-inf"))
        acc, row_lse = finish(m, l, acc, unit, sink)
    else:
        acc, row_lse = finish(m, l, acc, unit, None)
    row = h.to(tl.int64) * out.head + index.to(tl.int64) * out.row
    at = out.ptr + split.to(tl.int64) * out_split + b * out.batch + row
    keep = q_real[:, None] & (value_dims < VALUE_DIM)[None, :]
    acc = acc.to(out.ptr.dtype.element_ty)
    tl.store(at[:, None] + value_dims[None, :], acc, mask=keep)
    lse_at = lse + split.to(tl.int64) * lse_split + (b * heads + h) * q_len + index
    tl.store(lse_at, row_lse, mask=q_real)
