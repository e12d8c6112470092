"""Before and after the Gluon backward kernel: numbers of each row, and dQ out of squares."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.gluon_squares import place_in_part
from saccade.ops.tiles import LOG2E, addresses


@triton.jit
def place(row, col, M: tl.constexpr):
    """Where an element of an M x D tile of dQ lies among its squares; M is 64 or D is."""
    square = row // 64 + col // 64
    return square * 4096 + place_in_part(row % 64, col % 64)


@triton.jit(do_not_specialize=["q_len", "q_tiles"])
def rows_kernel(
    out, dout, lse, dlse, delta, rows, dq, q_len, heads, q_tiles,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What a tile of rows contributes, and an empty dQ.

    delta = rowsum(dO * O) - dlse `[B, H, Lq]`; rows `[B * H * q_tiles, 2, M]` holds lse in powers
    of two and delta.  Rows that see nothing, and those past the end, get +inf, so their P is 0.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    inside = tl.arange(0, M)
    row = tl.program_id(1) * M + inside
    dims = tl.arange(0, D)
    keep = row < q_len
    o_at = addresses(out.ptr + b * out.batch + h * out.head, row, out.row, dims)
    d_at = addresses(dout.ptr + b * dout.batch + h * dout.head, row, dout.row, dims)
    o = tl.load(o_at, mask=keep[:, None], other=0.0).to(tl.float32)
    d = tl.load(d_at, mask=keep[:, None], other=0.0).to(tl.float32)
    at = (b * heads + h) * q_len + row
    found = tl.sum(o * d, 1)
    if dlse is not None:
        found -= tl.load(dlse + at, mask=keep, other=0.0)
    tl.store(delta + at, found, mask=keep)
    top = tl.load(lse + at, mask=keep, other=float("-inf"))
    top = tl.where(top == float("-inf"), float("inf"), top * LOG2E)
    tile = (b * heads + h) * q_tiles + tl.program_id(1)
    tl.store(rows + tile * (2 * M) + inside, top)
    tl.store(rows + tile * (2 * M) + M + inside, found)
    tl.store(dq + tile * (M * D) + tl.arange(0, M * D), tl.zeros([M * D], tl.float32))


@triton.jit(do_not_specialize=["q_len", "q_tiles"])
def collect_kernel(squares, dq, scale, q_len, heads, q_tiles, D: tl.constexpr, M: tl.constexpr):
    """dQ `[B, H, Lq, D]` = scale * what the programs added up in squares."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    inside = tl.arange(0, M)
    dims = tl.arange(0, D)
    tile = (b * heads + h) * q_tiles + tl.program_id(1)
    found = tl.load(squares + tile * (M * D) + place(inside[:, None], dims[None, :], M))
    row = tl.program_id(1) * M + inside
    at = addresses(dq.ptr + b * dq.batch + h * dq.head, row, dq.row, dims)
    tl.store(at, (found * scale).to(dq.ptr.dtype.element_ty), mask=(row < q_len)[:, None])
