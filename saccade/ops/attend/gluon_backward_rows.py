"""What comes before and after the Gluon gradients, in plain Triton: a tile of queries a program."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.tiles import LOG2E, addresses, load_tile


@triton.jit(do_not_specialize=["q_len"])
def prepare_kernel(
    out, dout, lse, dlse, delta, stats, dq, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr
):
    """delta = rowsum(dO * O) - dlse; lse in powers of two and delta, by tiles; dQ set to 0.

    out, dout are Planes; lse, dlse, delta `[B, H, Lq]`; stats `[B * H, tiles, 2, ROWS]`; dq
    `[B * H, tiles, ROWS * D]`.  Rows that see nothing, or do not exist, get +inf: their P is 0.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.arange(0, ROWS)
    rows = tile * ROWS + columns
    dims = tl.arange(0, D)
    keep = rows < q_len
    o_at = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    d_at = addresses(dout.ptr + b * dout.batch + h * dout.head, rows, dout.row, dims)
    o = load_tile(o_at, keep, dims, D, True).to(tl.float32)
    d = load_tile(d_at, keep, dims, D, True).to(tl.float32)
    at = (b * heads + h) * q_len + rows
    found = tl.sum(o * d, 1) - tl.load(dlse + at, mask=keep, other=0.0)
    tl.store(delta + at, found, mask=keep)
    whole = (b * heads + h) * tl.num_programs(1) + tile
    tl.store(stats + (whole * 2 + 1) * ROWS + columns, found)
    found = tl.load(lse + at, mask=keep, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * LOG2E)
    tl.store(stats + whole * 2 * ROWS + columns, found)
    tl.store(dq + whole * (ROWS * D) + tl.arange(0, ROWS * D), tl.zeros([ROWS * D], tl.float32))


@triton.jit(do_not_specialize=["q_len"])
def convert_kernel(dq, out, scale, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr):
    """dQ times scale, from the order of registers (`_add_up`) into rows of the Plane `out`."""
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
