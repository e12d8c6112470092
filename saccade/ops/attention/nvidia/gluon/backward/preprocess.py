"""Before the Gluon gradients: lse and delta of every row, and a dQ accumulator of zeros."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attention.nvidia.triton.backward import row_stats


@triton.jit(do_not_specialize=["q_len"])
def preprocess_kernel(
    out, dout, lse, dlse, delta, lse_delta, dq_accum, q_len, heads,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta and lse of a tile of queries (`row_stats`), and its dq_accum set to 0.

    Args:
        delta: `[B, H, Lq]`.
        lse_delta: `[B * H, tiles, 2, BLOCK_M]`: lse in powers of two, and delta once more, aligned
            for TMA.
        dq_accum: float32 `[B * H, tiles, BLOCK_M * D]`.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.arange(0, BLOCK_M)
    rows = tile * BLOCK_M + columns
    sums, lse_log2 = row_stats(out, dout, lse, dlse, b, h, rows, q_len, heads, D, D)
    tl.store(delta + (b * heads + h) * q_len + rows, sums, mask=rows < q_len)
    index = (b * heads + h) * tl.num_programs(1) + tile
    tl.store(lse_delta + index * 2 * BLOCK_M + columns, lse_log2)
    tl.store(lse_delta + (index * 2 + 1) * BLOCK_M + columns, sums)
    tl.store(
        dq_accum + index * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D),
        tl.zeros([BLOCK_M * D], tl.float32),
    )
