"""After the Gluon gradients: dQ converted, and dK and dV summed over the splits of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu.triton_lang import addresses


@triton.jit(do_not_specialize=["q_len"])
def convert_dq_kernel(dq_accum, out, scale, q_len, heads, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """dQ times scale, from the order of the accumulator (`dq_accum.py`) into a StridedTensor."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    index = (b * heads + h) * tl.num_programs(1) + tile
    dq = tl.load(dq_accum + index * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D))
    dq = (dq * scale).to(out.ptr.dtype.element_ty)
    # halves of D, columns by 8, warps, rows of 8, columns by 2, rows by 8, columns
    dq = dq.reshape(2, D // 16, 4, 8, 4, 2, 2).permute(2, 5, 3, 0, 1, 4, 6).reshape(BLOCK_M, D)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    pointers = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    tl.store(pointers, dq, mask=(rows < q_len)[:, None])


@triton.jit(do_not_specialize=["k_len"])
def sum_dkv_kernel(
    dk_splits, dv_splits, dk, dv, k_len,
    SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dK and dV of SPLITS splits, float32 `[B, Hkv * SPLITS, Lk, D]`, into `[B, Hkv, Lk, D]`.

    They are added in a fixed order, so that equal terms give equal sums.
    """
    bh = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    mask = (rows < k_len)[:, None]
    inside = rows[:, None] * D + dims[None, :]
    for is_dv in tl.static_range(2):
        splits = dv_splits if is_dv else dk_splits
        total = tl.zeros([ROWS, D], tl.float32)
        for split in tl.static_range(SPLITS):
            base = splits + (bh * SPLITS + split) * k_len * D
            total += tl.load(base + inside, mask=mask, other=0.0)
        out = dv if is_dv else dk
        tl.store(out + bh * k_len * D + inside, total.to(out.dtype.element_ty), mask=mask)
