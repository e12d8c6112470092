"""Online softmax with P in fp8, and P as the register operand of wgmma.

wgmma leaves S so that a thread has keys 2c, 2c + 1, 8 + 2c, 9 + 2c of every sixteen, c being its
index within a quad of threads; as an operand a thread must supply four consecutive keys.  A sum
over keys has no order, so V keeps each sixteen keys as 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15
(`transpose.py`), and each thread supplies the keys that it has.

P is exp2(S - row_max + 8): e4m3 reaches from 2^-9 to 448, so that small weights are kept.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608), section 3.3.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

P_EXPONENT = gl.constexpr(8.0)  # the largest weight is 2^8


@gluon.jit
def online_softmax(s, row_max, scale_log2):
    """A tile of S against the running maximum: (packed P, row sums, row_max, rescale of O).

    Each thread keeps row sums of its own, `[ROWS, 4]`, which are reduced at the end of a work tile.
    """
    new_max = gl.maximum(row_max, gl.max(s, 1))
    rescale = gl.exp2((row_max - new_max) * scale_log2)
    first, second, third, fourth = _by_fours(
        s * scale_log2 - (new_max * scale_log2 - P_EXPONENT)[:, None]
    )
    first, second, third, fourth = gl.exp2(first), gl.exp2(second), gl.exp2(third), _exp2(fourth)
    sums = gl.sum((first + second) + (third + fourth), 1)
    return _pack(first, second, third, fourth), sums, new_max, rescale


@gluon.jit
def _by_fours(x):
    """`[ROWS, N]` in four parts `[ROWS, N / 16, 4]`: keys 2c, 2c + 1, 8 + 2c, 9 + 2c of sixteen."""
    ROWS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    even, odd = gl.split(x.reshape([ROWS, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _exp2(x):
    """2^x for x <= 8 by multiply-adds, off by 0.2 % at most, little beside the 3 bits of e4m3.

    The special function unit is as busy here as the tensor cores: to compute a quarter of the
    exponentials without it gains 3 to 6 %, a half costs more than it saves.  Below -100: 2^-100.
    Source: FlashAttention-4, 2026 (arXiv 2603.05451); the parabola is fitted to the relative error.
    """
    x = gl.maximum(x, -100.0)
    shifted = x + 12582912.0  # 1.5 * 2^23: the integer next to x is in the low bits
    f = x - (shifted - 12582912.0)
    power = (0.23842256 * f + 0.70343653) * f + 1.0004427
    bits = power.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _pack(first, second, third, fourth):
    """P in e4m3, four weights to a 32-bit register, all of them from one thread."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [first, second, third, fourth],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def p_operand(packed, zero, O: gl.constexpr):
    """Packed P as the register operand of wgmma, without data movement.

    A 32-bit register stands for its four weights, so it is named four times and read once.  `zero`
    is 0, which the compiler cannot prove: a register that went straight into wgmma would be
    written while the product before still reads it, and ptxas then serializes all products.
    """
    ROWS: gl.constexpr = packed.shape[0]
    GROUPS: gl.constexpr = packed.shape[1]
    packed = packed ^ zero
    twice = gl.join(packed, packed)
    named = gl.join(twice, twice).reshape([ROWS, 16 * GROUPS])
    ordered = gl.convert_layout(named, gl.DotOperandLayout(0, O, 4))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [ordered], gl.float8e4nv, True, 4
    )
