"""Forward attention on GPUs: one program computes one tile of queries of one head.

A program loops over the key tiles its queries attend to: first the full tiles, which need no mask,
then the partial ones: sinks, the left end of a window, the diagonal, the end of the sequence.
Programs with the longest loops start first.
"""

# Triton's language has no types.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu.triton_lang import (
    LOWEST,
    addresses,
    block_list_at,
    finish,
    key_tiles,
    load_tile,
    online_softmax,
    partial_tile,
    real_keys,
    scores_of,
    seqlen_of,
    tile_mask,
    unit_of,
)


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def forward_kernel(
    q, k, v, out, lse, seqlen_info, mask_args, score_args, block_lists, q_len, k_len, q_offset,
    heads, groups,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v; q, k, v, out are StridedTensors, lse `[B, H, Lq]`."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    kv_head = h // groups
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    lse += (b * heads + h) * q_len
    q_first, k_first, q_len, k_len, q_offset, tile = seqlen_of(
        seqlen_info, b, kv_head, tile, q_len, k_len, q_offset
    )
    row = tile * BLOCK_M
    if row >= q_len:
        return
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    q_real = rows < q_len
    q_pos = rows + q_offset
    q_at = addresses(q.ptr + b * q.batch + h * q.head + q_first * q.row, rows, q.row, dims)
    q_tile = load_tile(q_at, q_real, dims, HEAD_DIM, True)
    k_ptr = k.ptr + b * k.batch + kv_head * k.head + k_first * k.row
    v_ptr = v.ptr + b * v.batch + kv_head * v.head + k_first * v.row
    if TMA:  # loads full tiles, with zeros for rows past the end
        k_desc = tl.make_tensor_descriptor(k_ptr, [k_len, HEAD_DIM], [k.row, 1], [BLOCK_N, BLOCK_D])
        v_desc = tl.make_tensor_descriptor(
            v_ptr, [k_len, VALUE_DIM], [v.row, 1], [BLOCK_N, BLOCK_V]
        )
    else:
        k_at = addresses(k_ptr, columns, k.row, dims)
        v_at = addresses(v_ptr, columns, v.row, value_dims)

    slope = 0.0
    if score_args.alibi_slopes is not None:
        slope = tl.load(score_args.alibi_slopes + b * score_args.alibi_slopes_batch + h)
    unit = unit_of(score_args, RAW)
    last_q = q_offset + tl.minimum(row + BLOCK_M, q_len) - 1
    num_sinks, first, full_from, full_to, last = key_tiles(
        q_offset + row, last_q, k_len, mask_args, CAUSAL, BLOCK_N
    )
    num_full = full_to - full_from
    num_all = num_sinks + last - first
    if block_lists.tiles is not None:
        block_list, num_full, num_all = block_list_at(block_lists, b, kv_head, tile)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for partial in tl.static_range(2):
        count = num_all - num_full if partial else num_full
        for i in tl.range(0, count, num_stages=STAGES):
            if block_lists.tiles is not None:
                start = tl.load(block_list + (num_full + i if partial else i)) * BLOCK_N
            elif partial:
                start = partial_tile(i, num_sinks, first, full_from, full_to) * BLOCK_N
            else:
                start = (full_from + i) * BLOCK_N
            k_pos = start + columns
            real = real_keys(mask_args, b, k_pos, k_len) if partial else k_pos >= 0
            if TMA:
                k_tile = k_desc.load([start, 0])
            else:
                k_tile = load_tile(k_at + start.to(tl.int64) * k.row, real, dims, HEAD_DIM, partial)
            qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
            s = scores_of(qk, score_args, slope, q_pos[:, None], k_pos[None, :], RAW)
            if partial:
                mask = tile_mask(
                    mask_args, b, h, kv_head, rows[:, None], q_pos[:, None], k_pos[None, :],
                    real[None, :], q_real[:, None], CAUSAL,
                )  # fmt: skip
                s = tl.where(mask, s, float("-inf"))
            m, l, p, rescale = online_softmax(m, l, s, unit)
            if TMA:
                v_tile = v_desc.load([start, 0])
                if partial and (mask_args.key_padding is not None):
                    v_tile = tl.where(real[:, None], v_tile, 0.0)
            else:
                v_tile = load_tile(
                    v_at + start.to(tl.int64) * v.row, real, value_dims, VALUE_DIM, partial
                )
            acc = tl.dot(
                p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION
            )
    if score_args.sink_logits is not None:
        acc, row_lse = finish(m, l, acc, unit, tl.load(score_args.sink_logits + h))
    else:
        acc, row_lse = finish(m, l, acc, unit, None)
    out_at = addresses(out.ptr + b * out.batch + h * out.head + q_first * out.row, rows, out.row,
                       value_dims)  # fmt: skip
    keep = q_real[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(out_at, acc.to(out.ptr.dtype.element_ty), mask=keep)
    tl.store(lse + q_first + rows, row_lse, mask=q_real)
