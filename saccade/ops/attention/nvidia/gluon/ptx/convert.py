"""Conversions and arithmetic on packed 16-bit numbers: two of them in a 32-bit register."""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.constexpr_function
def _prmt_asm(selector):
    return f"prmt.b32 $0, $1, $2, {selector};"


@gluon.jit
def prmt(x, y, SELECTOR: gl.constexpr):
    """Four bytes out of x (0 to 3) and y (4 to 7); the last hex digit selects the lowest byte."""
    asm: gl.constexpr = _prmt_asm(SELECTOR)
    return gl.inline_asm_elementwise(asm, "=r,r,r", [x, y], gl.int32, True, 1)


@triton.constexpr_function
def _pack_asm(dtype):
    return f"cvt.rn.{dtype}x2.f32 $0, $2, $1;"


@gluon.jit
def pack(low, high, DTYPE: gl.constexpr):
    """Two float32 rounded to DTYPE (f16 or bf16) in one register."""
    asm: gl.constexpr = _pack_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], gl.int32, True, 1)


@gluon.jit
def pack_f16x2(low, high):
    """Two float32 rounded to float16 in one register."""
    return pack(low, high, "f16")


@gluon.jit
def pack_bf16x2(low, high):
    """Two float32 rounded to bfloat16 in one register."""
    return pack(low, high, "bf16")


@gluon.jit
def mul_f16x2(x, y):
    """Element-wise products of two packed float16 pairs."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], gl.int32, True, 1
    )


@gluon.jit
def bf16x2_to_f16x2(x):
    """A packed pair of bfloat16 as one of float16."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000;"
        " cvt.rn.f16x2.f32 $0, b, a; }",
        "=r,r",
        [x],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def e4m3x2_to_f16x2(x, HALF: gl.constexpr):
    """The lower (HALF 0) or upper (1) two of four packed e4m3 numbers, as float16."""
    if HALF == 0:
        asm: gl.constexpr = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, a; }"
    else:
        asm: gl.constexpr = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, b; }"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], gl.int32, True, 1)


@gluon.jit
def float_as_int(x):
    """The bits of a float32."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,f", [x], gl.int32, True, 1)
