"""mma.m16n8k16, and what moves its fragments between the lanes of a warp.

Lane `4 g + t` (g below 8, t below 4) holds, of a product `[16, 16] @ [16, 8]` (PTX ISA),

    of A (left)      rows g and g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9
    of B (right)     column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
    of C (result)    rows g and g + 8, columns 2t, 2t + 1

The order of a sum is free, so "columns of A" may be any four channels or keys of lane t, as long
as A and B agree.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

F16 = gl.constexpr("f16")


@triton.constexpr_function
def _mma_asm(dtype):
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0, $1, $2, $3}},"
        " {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.jit
def mma_m16n8k16(a, b, c, DTYPE: gl.constexpr = F16):
    """c + a @ b: four, two and four registers; a and b of DTYPE (f16 or bf16), float32 out."""
    a0, a1, a2, a3 = a
    b0, b1 = b
    c0, c1, c2, c3 = c
    asm: gl.constexpr = _mma_asm(DTYPE)
    return gl.inline_asm_elementwise(
        asm, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (gl.float32, gl.float32, gl.float32, gl.float32), True, 1,
    )  # fmt: skip


@gluon.jit
def movmatrix_trans(x):
    """Transpose of an 8 x 8 matrix of 16 bits: lane 4 g + t holds row g, columns 2t, 2t + 1."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], gl.int32, True, 1
    )


@triton.constexpr_function
def _shfl_asm(lane_mask):
    return f"shfl.sync.bfly.b32 $0, $1, {lane_mask}, 31, -1;"


@gluon.jit
def shfl_xor(x, LANE_MASK: gl.constexpr):
    """The float32 of the lane whose number differs in the bits LANE_MASK."""
    asm: gl.constexpr = _shfl_asm(LANE_MASK)
    return gl.inline_asm_elementwise(asm, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def column_allreduce_max(x):
    """Maximum over the eight lanes that hold a column of C (the same t)."""
    x = gl.maximum(x, shfl_xor(x, 4))
    x = gl.maximum(x, shfl_xor(x, 8))
    return gl.maximum(x, shfl_xor(x, 16))


@gluon.jit
def column_allreduce_sum(x):
    """Sum over the eight lanes that hold a column of C (the same t)."""
    x += shfl_xor(x, 4)
    x += shfl_xor(x, 8)
    return x + shfl_xor(x, 16)
