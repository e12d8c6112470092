"""What comes before and after the Gluon gradients, in plain Triton: a tile of queries a program."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attention.nvidia.triton.backward import row_stats
from saccade.ops.gpu.triton_lang import addresses


@triton.jit(do_not_specialize=["q_len"])
def prepare_kernel(
    out, dout, lse, dlse, delta, stats, dq, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr
):
    """What every row contributes (`row_sums`), and dQ set to 0.

    delta is `[B, H, Lq]`; stats `[B * H, tiles, 2, ROWS]` holds lse in powers of two and delta once
    more, for the copy engine; dq is `[B * H, tiles, ROWS * D]`.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.arange(0, ROWS)
    rows = tile * ROWS + columns
    found, top = row_stats(out, dout, lse, dlse, b, h, rows, q_len, heads, D, D)
    tl.store(delta + (b * heads + h) * q_len + rows, found, mask=rows < q_len)
    whole = (b * heads + h) * tl.num_programs(1) + tile
    tl.store(stats + whole * 2 * ROWS + columns, top)
    tl.store(stats + (whole * 2 + 1) * ROWS + columns, found)
    tl.store(dq + whole * (ROWS * D) + tl.arange(0, ROWS * D), tl.zeros([ROWS * D], tl.float32))


@triton.jit(do_not_specialize=["q_len"])
def convert_kernel(dq, out, scale, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr):
    """dQ times scale, from the order of registers (`backward_registers`) into a Plane."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    whole = (b * heads + h) * tl.num_programs(1) + tile
    found = tl.load(dq + whole * (ROWS * D) + tl.arange(0, ROWS * D))
    found = (found * scale).to(out.ptr.dtype.element_ty)
    # halves of D, columns by 8, warps, rows of 8, columns by 2, rows by 8, columns
    found = found.reshape(2, D // 16, 4, 8, 4, 2, 2).permute(2, 5, 3, 0, 1, 4, 6).reshape(ROWS, D)
    rows = tile * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    at = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    tl.store(at, found, mask=(rows < q_len)[:, None])


@triton.jit(do_not_specialize=["k_len"])
def sum_kernel(
    dk_shares, dv_shares, dk, dv, k_len,
    SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of SPLITS shares each, float32 `[B, Hkv * SPLITS, Lk, D]`, into `[B, Hkv, Lk, D]`.

    The shares are added in one order, so that equal shares give equal sums.
    """
    at = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    keep = (rows < k_len)[:, None]
    inside = rows[:, None] * D + dims[None, :]
    for values in tl.static_range(2):
        shares = dv_shares if values else dk_shares
        found = tl.zeros([ROWS, D], tl.float32)
        for share in tl.static_range(SPLITS):
            base = shares + (at * SPLITS + share) * k_len * D
            found += tl.load(base + inside, mask=keep, other=0.0)
        out = dv if values else dk
        tl.store(out + at * k_len * D + inside, found.to(out.dtype.element_ty), mask=keep)
