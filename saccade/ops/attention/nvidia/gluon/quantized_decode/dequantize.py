"""Quantized integers as float16 operands, without converting them.

As the bits of a float16 an integer c below 1024 is the denormal number c * 2^-24, which tensor
cores read exactly (the upper four bits of a byte are 16 c * 2^-24); `dequant_factor` undoes it at
the end.  Two integers of keys cost one instruction that spreads bytes (prmt), two of values one and
a half.  fp8 numbers are converted, two by one instruction.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.convert import e4m3x2_to_f16x2, mul_f16x2, prmt

F16_DENORM_MIN = gl.constexpr(2.0**-24)  # the smallest positive float16: its lowest bit


@gluon.jit
def unpack_k(qdata, ROW: gl.constexpr, HALF: gl.constexpr, REG: gl.constexpr, REGS: gl.constexpr,
             FORMAT: gl.constexpr):  # fmt: skip
    """Four channels of a key as two f16x2 (int4: the even channels, then the odd ones)."""
    if FORMAT == "int4":
        x = qdata[ROW * REGS + REG]
        MASK: gl.constexpr = 0x00F000F0 if HALF == 1 else 0x000F000F
        pairs = (x & MASK, (x >> 8) & MASK)
    else:
        x = qdata[(ROW * 2 + HALF) * REGS + REG]
        if FORMAT == "fp8":
            pairs = (e4m3x2_to_f16x2(x, 0), e4m3x2_to_f16x2(x, 1))
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (prmt(x, zero, 0x4140), prmt(x, zero, 0x4342))
    return pairs


@gluon.jit
def unpack_v(x, y, PAIR: gl.constexpr, HALF: gl.constexpr, FORMAT: gl.constexpr):
    """Channels 2 PAIR and 2 PAIR + 1 of the registers of two keys, each an f16x2 over the keys."""
    if FORMAT == "fp8":
        both = prmt(x, y, 0x7362 if PAIR == 1 else 0x5140)
        pairs = (e4m3x2_to_f16x2(both, 0), e4m3x2_to_f16x2(both, 1))
    else:
        both = prmt(x, y, 0x7632 if PAIR == 1 else 0x5410)
        if FORMAT == "int4":
            MASK: gl.constexpr = 0x00F000F0 if HALF == 1 else 0x000F000F
            pairs = (both & MASK, (both >> 8) & MASK)
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (both & 0x00FF00FF, prmt(both, zero, 0x4341))
    return pairs


@gluon.jit
def fold_k_scale(q, scale, D: gl.constexpr, FORMAT: gl.constexpr):
    """q * scale, rounded to float16, in the channel order of `unpack_k`: B fragments of Q^T."""
    found = ()
    for i in gl.static_range(D // 16):
        low, high = mul_f16x2(q[2 * i], scale[2 * i]), mul_f16x2(q[2 * i + 1], scale[2 * i + 1])
        if FORMAT == "int4":
            low, high = prmt(low, high, 0x5410), prmt(low, high, 0x7632)
        found += (low, high)
    return found


@triton.constexpr_function
def mid_integer(form):
    """The integer in the middle of a format's range, around which rounding errors average out."""
    return {"int4": 8, "int8": 128, "fp8": 0}[form]


@triton.constexpr_function
def minus_mid_integer_f16x2(form):
    """-mid_integer(form) twice, as bits of float16."""
    return {"int4": 0xC800C800, "int8": 0xD800D800, "fp8": 0}[form]


@triton.constexpr_function
def dequant_factor(form, half):
    """What quantized value times weight is multiplied by, given how its bits were read."""
    if form == "fp8":
        return 1.0
    return 2.0**20 if form == "int4" and half == 1 else 2.0**24
