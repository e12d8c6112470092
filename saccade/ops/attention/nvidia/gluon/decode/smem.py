"""How sixteen rows of keys or values get into a warp's shared memory, and from there to fragments.

Rows are copied 16 bytes a thread (cp.async) and lie as in global memory, except for an XOR swizzle
against bank conflicts: 16-byte chunk c of row r is stored at chunk c ^ (r % 8).  Then the eight
rows of a matrix that `ldmatrix` reads lie in different banks, and so do rows that a copy writes.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.async_copy import cp_async_16


@gluon.jit
def copy_offsets(lane, D: gl.constexpr):
    """(row among those of one copy, byte in that row, swizzled byte in shared memory) of a lane."""
    row, chunk = lane // (D // 8), lane % (D // 8)
    return row, chunk * 16, row * (2 * D) + (chunk ^ row) * 16


@gluon.jit
def cp_async_rows(smem, gmem, num_valid, D: gl.constexpr, STRIDE: gl.constexpr):
    """Issue copies of sixteen rows, STRIDE bytes apart in global memory.

    Args:
        smem, gmem: of the lane's chunk of row 0, as `copy_offsets` says.
        num_valid: how many rows exist from the lane's first one on; zeros stand for the others.
    """
    ROWS: gl.constexpr = 256 // D  # of one copy
    for n in gl.static_range(16 // ROWS):
        size = gl.where(num_valid > n * ROWS, 16, 0)
        swizzled = smem ^ (n * ROWS % 8 * 16)
        cp_async_16(swizzled, gmem, size, n * 512, n * ROWS * STRIDE)


@gluon.jit
def ldmatrix_offsets(lane, D: gl.constexpr):
    """The swizzled byte of a lane's row for `ldmatrix_x4`: (of keys, of values, transposed)."""
    row, high, low = lane % 8, lane // 16, lane // 8 % 2
    keys = (row + 8 * low) * (2 * D) + (row ^ high) * 16
    values = (row + 8 * high) * (2 * D) + (row ^ low) * 16
    return keys, values


@triton.constexpr_function
def _ldmatrix_asm(offset, transpose):
    trans = ".trans" if transpose else ""
    return f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"


@gluon.jit
def ldmatrix_x4(smem, COLUMN: gl.constexpr, TRANSPOSE: gl.constexpr):
    """The A fragment of sixteen rows at channels 16 COLUMN .. 16 COLUMN + 15.

    Args:
        smem: of the sixteen rows, plus what `ldmatrix_offsets` says.
        TRANSPOSE: rows of A are channels (values), not keys.
    """
    asm: gl.constexpr = _ldmatrix_asm(COLUMN // 4 * 128, TRANSPOSE)
    return gl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,r", [smem ^ (COLUMN % 4 * 32)],
        (gl.int32, gl.int32, gl.int32, gl.int32), False, 1,
    )  # fmt: skip


@gluon.jit
def load_a_fragments(smem, D: gl.constexpr, TRANSPOSE: gl.constexpr):
    """All A fragments of sixteen rows of D channels."""
    found = (ldmatrix_x4(smem, 0, TRANSPOSE),)
    for j in gl.static_range(1, D // 16):
        found += (ldmatrix_x4(smem, j, TRANSPOSE),)
    return found
