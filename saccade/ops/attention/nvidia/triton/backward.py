"""Gradients of attention on GPUs: two kernels without atomics, bitwise deterministic.

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse, the gradients are

    dV = P^T dO      dS = P * (dO V^T - delta) * dS/d(qk)      dQ = dS K      dK = dS^T Q

A program of `backward_kv_kernel` computes a tile of keys and loops over all queries of the group
that attend to it; a program of `backward_q_kernel` computes a tile of queries.  Both recompute S.
One kernel with atomic additions to dQ would save two matrix products, but would not be
deterministic.
"""

# Triton's language has no types.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu.triton_lang import (
    LOG2E,
    addresses,
    block_list_at,
    key_tiles,
    load_tile,
    partial_tile,
    query_tiles,
    real_keys,
    scores_of,
    seqlen_of,
    softcap_gradient,
    tile_mask,
    unit_of,
)


@triton.jit
def row_stats(
    out, dout, lse, dlse, b, h, rows, q_len, heads, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Statistics of rows of one head: delta = rowsum(dO * O) - dlse, and lse * log2(e).

    Rows whose keys are all masked, and rows that do not exist, get +inf for their lse, so that
    their P is 0.  out, dout are StridedTensors with DIM columns; lse, dlse `[B, H, Lq]`.
    """
    dims = tl.arange(0, BLOCK)
    keep = rows < q_len
    o_at = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    d_at = addresses(dout.ptr + b * dout.batch + h * dout.head, rows, dout.row, dims)
    o = load_tile(o_at, keep, dims, DIM, True).to(tl.float32)
    d = load_tile(d_at, keep, dims, DIM, True).to(tl.float32)
    at = (b * heads + h) * q_len + rows
    delta = tl.sum(o * d, 1) - tl.load(dlse + at, mask=keep, other=0.0)
    found = tl.load(lse + at, mask=keep, other=float("-inf"))
    return delta, tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    out, dout, lse, dlse, delta, lse2, q_len, heads,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The statistics of every row (`row_stats`): delta and lse2 `[B, H, Lq]`."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    found, top = row_stats(out, dout, lse, dlse, b, h, rows, q_len, heads, VALUE_DIM, BLOCK_V)
    at = (b * heads + h) * q_len + rows
    tl.store(delta + at, found, mask=rows < q_len)
    tl.store(lse2 + at, top, mask=rows < q_len)


@triton.jit
def weights_of(qk, score_args, slope, q_pos, k_pos, lse2, unit, RAW: tl.constexpr):
    """P of one tile from the products q.k and the rows' lse * log2(e)."""
    return tl.exp2(scores_of(qk, score_args, slope, q_pos, k_pos, RAW) * unit - lse2)


@triton.jit
def score_gradient(p, dp, delta, qk, score_args):
    """Gradient with respect to the scaled products q.k."""
    ds = p * (dp - delta)
    if score_args.softcap is not None:
        ds *= softcap_gradient(qk, score_args)
    return ds


@triton.jit
def load_stats(lse2, delta, at, keep, MASKED: tl.constexpr):
    """(lse * log2(e), delta) of some rows."""
    if MASKED:
        return tl.load(lse2 + at, mask=keep, other=0.0), tl.load(delta + at, mask=keep, other=0.0)
    return tl.load(lse2 + at), tl.load(delta + at)


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def backward_kv_kernel(
    q, k, v, dout, dk, dv, lse2, delta, seqlen_info, mask_args, score_args, block_lists, q_len,
    k_len, q_offset, heads, groups,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(dK, dV) of one tile of keys of one KV head, summed over its group of query heads."""
    kv_heads = heads // groups
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    total_rows, stored = q_len, k_len
    q_first, k_first, q_len, k_len, q_offset, tile = seqlen_of(
        seqlen_info, b, kv_head, tl.program_id(1), q_len, k_len, q_offset
    )
    if seqlen_info.sequence is not None:
        stored = k_len
        if tl.load(seqlen_info.sequence + tl.program_id(1)) < 0:
            return
    start = tile * BLOCK_N
    k_pos = start + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    real = real_keys(mask_args, b, k_pos, k_len)
    k_at = addresses(k.ptr + b * k.batch + kv_head * k.head + k_first * k.row, k_pos, k.row, dims)
    v_at = addresses(
        v.ptr + b * v.batch + kv_head * v.head + k_first * v.row, k_pos, v.row, value_dims
    )
    k_tile = load_tile(k_at, real, dims, HEAD_DIM, True)
    v_tile = load_tile(v_at, real, value_dims, VALUE_DIM, True)
    unit = unit_of(score_args, RAW)
    first, full_from, full_to, last = query_tiles(
        start, tl.minimum(start + BLOCK_N, k_len) - 1, q_len, q_offset, mask_args, CAUSAL, BLOCK_M
    )
    if start + BLOCK_N > k_len:  # the sequence ends in this tile
        full_to = full_from
    num_full = full_to - full_from
    num_all = tl.where(start < k_len, last - first, 0)
    num_full = tl.minimum(num_full, num_all)
    if block_lists.tiles is not None:
        block_list, num_full, num_all = block_list_at(block_lists, b, kv_head, tile)

    k_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(groups):
        h = kv_head * groups + member
        q_ptr = q.ptr + b * q.batch + h * q.head + q_first * q.row
        d_ptr = dout.ptr + b * dout.batch + h * dout.head + q_first * dout.row
        if TMA:  # needs no registers for addresses, which are scarce here
            q_desc = tl.make_tensor_descriptor(
                q_ptr, [q_len, HEAD_DIM], [q.row, 1], [BLOCK_M, BLOCK_D]
            )
            d_desc = tl.make_tensor_descriptor(
                d_ptr, [q_len, VALUE_DIM], [dout.row, 1], [BLOCK_M, BLOCK_V]
            )
        else:
            q_at = addresses(q_ptr, columns, q.row, dims)
            d_at = addresses(d_ptr, columns, dout.row, value_dims)
        stats = (b * heads + h) * total_rows + q_first
        slope = 0.0
        if score_args.alibi_slopes is not None:
            slope = tl.load(score_args.alibi_slopes + b * score_args.alibi_slopes_batch + h)
        for partial in tl.static_range(2):
            count = num_all - num_full if partial else num_full
            for i in tl.range(0, count, num_stages=STAGES):
                if block_lists.tiles is not None:
                    row = tl.load(block_list + (num_full + i if partial else i)) * BLOCK_M
                elif partial:
                    row = partial_tile(i, 0, first, full_from, full_to) * BLOCK_M
                else:
                    row = (full_from + i) * BLOCK_M
                rows = row + columns
                q_real = rows < q_len
                q_pos = rows + q_offset
                if TMA:
                    q_tile = q_desc.load([row, 0])
                    d_tile = d_desc.load([row, 0])
                else:
                    at = row.to(tl.int64)
                    q_tile = load_tile(q_at + at * q.row, q_real, dims, HEAD_DIM, partial)
                    d_tile = load_tile(d_at + at * dout.row, q_real, value_dims, VALUE_DIM, partial)
                row_lse, row_delta = load_stats(lse2, delta, stats + rows, q_real, partial)
                qk = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [N, M]
                p = weights_of(
                    qk, score_args, slope, q_pos[None, :], k_pos[:, None], row_lse[None, :], unit,
                    RAW,
                )  # fmt: skip
                if partial:
                    mask = tile_mask(
                        mask_args, b, h, kv_head, rows[None, :], q_pos[None, :], k_pos[:, None],
                        real[:, None], q_real[None, :], CAUSAL,
                    )  # fmt: skip
                    p = tl.where(mask, p, 0.0)
                v_grad = tl.dot(p.to(d_tile.dtype), d_tile, v_grad, input_precision=PRECISION)
                dp = tl.dot(v_tile, d_tile.T, input_precision=PRECISION)
                ds = score_gradient(p, dp, row_delta[None, :], qk, score_args)
                k_grad = tl.dot(ds.to(q_tile.dtype), q_tile, k_grad, input_precision=PRECISION)
    k_grad *= score_args.scale
    inside = k_pos < stored
    at = addresses(
        dk.ptr + b * dk.batch + kv_head * dk.head + k_first * dk.row, k_pos, dk.row, dims
    )
    keep = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(at, k_grad.to(dk.ptr.dtype.element_ty), mask=keep)
    at = addresses(
        dv.ptr + b * dv.batch + kv_head * dv.head + k_first * dv.row, k_pos, dv.row, value_dims
    )
    keep = inside[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(at, v_grad.to(dv.ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def backward_q_kernel(
    q, k, v, dout, dq, lse2, delta, seqlen_info, mask_args, score_args, block_lists, q_len,
    k_len, q_offset, heads, groups,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    kv_head = h // groups
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    stats = (b * heads + h) * q_len
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
    d_at = addresses(
        dout.ptr + b * dout.batch + h * dout.head + q_first * dout.row, rows, dout.row, value_dims
    )
    q_tile = load_tile(q_at, q_real, dims, HEAD_DIM, True)
    d_tile = load_tile(d_at, q_real, value_dims, VALUE_DIM, True)
    row_lse, row_delta = load_stats(lse2, delta, stats + q_first + rows, q_real, True)
    k_at = addresses(k.ptr + b * k.batch + kv_head * k.head + k_first * k.row, columns, k.row, dims)
    v_at = addresses(
        v.ptr + b * v.batch + kv_head * v.head + k_first * v.row, columns, v.row,
        value_dims,
    )  # fmt: skip
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

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            k_tile = load_tile(k_at + start.to(tl.int64) * k.row, real, dims, HEAD_DIM, partial)
            v_tile = load_tile(
                v_at + start.to(tl.int64) * v.row, real, value_dims, VALUE_DIM, partial
            )
            qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
            p = weights_of(
                qk, score_args, slope, q_pos[:, None], k_pos[None, :], row_lse[:, None], unit, RAW
            )
            if partial:
                mask = tile_mask(
                    mask_args, b, h, kv_head, rows[:, None], q_pos[:, None], k_pos[None, :],
                    real[None, :], q_real[:, None], CAUSAL,
                )  # fmt: skip
                p = tl.where(mask, p, 0.0)
            dp = tl.dot(d_tile, v_tile.T, input_precision=PRECISION)
            ds = score_gradient(p, dp, row_delta[:, None], qk, score_args)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    at = addresses(dq.ptr + b * dq.batch + h * dq.head + q_first * dq.row, rows, dq.row, dims)
    keep = q_real[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(at, (acc * score_args.scale).to(dq.ptr.dtype.element_ty), mask=keep)
