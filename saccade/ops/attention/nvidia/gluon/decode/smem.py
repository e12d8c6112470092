"""How sixteen rows of keys or values get into a warp's shared memory, and from there to products.

Rows are asked for 16 bytes a thread (cp.async) and lie as in global memory, except that the pieces
of 16 bytes of row r change places by r % 8: then the eight rows of a matrix that `ldmatrix` reads
lie in different banks, and so do the rows that a copy writes.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx import copy_line


@gluon.jit
def dynamic_memory(thread, never, UNITS: gl.constexpr):
    """Address (a multiple of 128) of UNITS x 4 bytes a thread that the warps of a program share.

    The store never happens; without one the compiler would drop the name of the memory.
    """
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [UNITS + 1, thread.shape[0]], LAYOUT)
    if never:
        memory.index(0).store(thread)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 at; mov.u32 at, global_smem; add.u32 at, at, 127; and.b32 $0, at, -128; }",
        "=r,r", [thread], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def put_at(lane, D: gl.constexpr):
    """(row among those of one copy, where a thread's 16 bytes lie in it, where they are put)."""
    row, piece = lane // (D // 8), lane % (D // 8)
    return row, piece * 16, row * (2 * D) + (piece ^ row) * 16


@gluon.jit
def ask_for_rows(place, address, there, D: gl.constexpr, STEP: gl.constexpr):
    """Ask for sixteen rows STEP bytes apart.

    Args:
        place, address: of the thread's share of row 0, as `put_at` says.
        there: how many rows exist from the thread's first one on; the others become 0.
    """
    ROWS: gl.constexpr = 256 // D  # of one copy
    for n in gl.static_range(16 // ROWS):
        size = gl.where(there > n * ROWS, 16, 0)
        turned = place ^ (n * ROWS % 8 * 16)
        copy_line(turned, address, size, n * 512, n * ROWS * STEP)


@gluon.jit
def get_at(lane, D: gl.constexpr):
    """Where a thread's row of the left side begins: (of keys by channels, of channels by keys)."""
    row, high, low = lane % 8, lane // 16, lane // 8 % 2
    keys = (row + 8 * low) * (2 * D) + (row ^ high) * 16
    values = (row + 8 * high) * (2 * D) + (row ^ low) * 16
    return keys, values


@triton.constexpr_function
def _matrix_text(offset, turned):
    turn = ".trans" if turned else ""
    return f"ldmatrix.sync.aligned.m8n8.x4{turn}.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"


@gluon.jit
def left_side(place, COLUMN: gl.constexpr, TURNED: gl.constexpr):
    """The left side of a product from sixteen rows: channels 16 COLUMN .. 16 COLUMN + 15.

    Args:
        place: of the sixteen rows, plus what `get_at` says.
        TURNED: rows of the left side are channels (values), not keys.
    """
    text: gl.constexpr = _matrix_text(COLUMN // 4 * 128, TURNED)
    return gl.inline_asm_elementwise(
        text, "=r,=r,=r,=r,r", [place ^ (COLUMN % 4 * 32)],
        (gl.int32, gl.int32, gl.int32, gl.int32), False, 1,
    )  # fmt: skip


@gluon.jit
def left_sides(place, D: gl.constexpr, TURNED: gl.constexpr):
    """All left sides from sixteen rows of D channels."""
    found = (left_side(place, 0, TURNED),)
    for j in gl.static_range(1, D // 16):
        found += (left_side(place, j, TURNED),)
    return found


@gluon.jit
def put_number(place, x, OFFSET: gl.constexpr):
    """A float32 of each thread into shared memory."""
    text: gl.constexpr = _put_text(OFFSET)
    gl.inline_asm_elementwise(text, "=r,r,f", [place, x], gl.int32, False, 1)


@triton.constexpr_function
def _put_text(offset):
    return f"st.shared.f32 [$1 + {offset}], $2; mov.u32 $0, 0;"


@gluon.jit
def get_number(place, OFFSET: gl.constexpr):
    """One float32 of each thread from shared memory."""
    text: gl.constexpr = _get_text(OFFSET)
    return gl.inline_asm_elementwise(text, "=f,r", [place], gl.float32, False, 1)


@triton.constexpr_function
def _get_text(offset):
    return f"ld.shared.f32 $0, [$1 + {offset}];"
