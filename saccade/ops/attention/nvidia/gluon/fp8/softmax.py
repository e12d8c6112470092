"""Weights in fp8 in the Gluon kernel: softmax of a tile, and the order of keys it asks of values.

Scores leave the matrix units so that a thread has those of keys 2c, 2c+1, 8+2c, 8+2c+1 of every
sixteen, c being its place among four; weights enter them so that it has four neighbours.  Sums have
no order: where values keep each sixteen keys as 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15, a thread
hands over what it has.  The values have to be transposed in any case, since the matrix units read
eight-bit operands along the summed dimension only (`transpose_kernel`).

Weights are exp2(score - maximum + 8): e4m3 reaches from 2^-9 to 448, so that small ones are kept.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608), section 3.3.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

OFFSET = gl.constexpr(8.0)  # the largest weight is 2^8
GROUP = 16  # keys that change places among themselves


@triton.jit
def transpose_kernel(
    v, v_batch, v_head, v_row, out, heads, length, padded,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values `[B, H, length, D]` as `[B, H, D, padded]`, groups of keys reordered, 0 at the end.

    Args:
        v: codes as bytes; out: contiguous bytes.
        padded: length rounded up to whole groups.
    """
    at = tl.program_id(1)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Slot 4c + 2i + e of a group holds key 8i + 2c + e.
    keys = (slots & -16) + ((slots & 2) << 2) + ((slots >> 1) & 6) + (slots & 1)
    dims = tl.arange(0, D)
    rows = v + (at // heads).to(tl.int64) * v_batch + (at % heads).to(tl.int64) * v_head
    rows += keys.to(tl.int64)[:, None] * v_row + dims[None, :]
    qdata = tl.load(rows, mask=(keys < length)[:, None], other=0)
    columns = out + (at.to(tl.int64) * D + dims)[:, None] * padded + slots[None, :]
    tl.store(columns, tl.trans(qdata), mask=(slots < padded)[None, :])


@gluon.jit
def weigh(s, m, unit):
    """A tile of scores against the running maximum: (packed weights, sums, m, shrink).

    Sums are those of each thread, `[ROWS, 4]`; they meet when the tile of queries is finished.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    shrink = gl.exp2((m - m_new) * unit)
    first, second, third, fourth = _by_fours(s * unit - (m_new * unit - OFFSET)[:, None])
    first, second, third, fourth = gl.exp2(first), gl.exp2(second), gl.exp2(third), _exp2(fourth)
    sums = gl.sum((first + second) + (third + fourth), 1)
    return _pack(first, second, third, fourth), sums, m_new, shrink


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
    """2^x for x <= 8 by multiply-adds, off by 0.2 % at most, which is little beside three bits.

    The unit of exponentials is as busy here as the matrix units; a quarter of its work done like
    this is worth 3 to 6 %, a half costs more than it saves.  What is below -100 becomes 2^-100.
    Source: FlashAttention-4, 2026 (arXiv 2603.05451); the parabola is fitted to the relative error.
    """
    x = gl.maximum(x, -100.0)
    shifted = x + 12582912.0  # 1.5 * 2^23: the whole number next to x is in the low bits
    f = x - (shifted - 12582912.0)
    power = (0.23842256 * f + 0.70343653) * f + 1.0004427
    bits = power.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _pack(first, second, third, fourth):
    """Weights in fp8, four to a word, each word from one thread's scores."""
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
def operand(words, nothing, O: gl.constexpr):
    """Packed weights as the matrix units take them from registers; nothing moves.

    A word stands for its four weights, so it is named four times and read once.  `nothing` is 0,
    which the compiler does not know: a word that went straight to the matrix units would be written
    while the product of the tile before reads its register, and ptxas then serialises everything.
    """
    ROWS: gl.constexpr = words.shape[0]
    GROUPS: gl.constexpr = words.shape[1]
    words = words ^ nothing
    twice = gl.join(words, words)
    named = gl.join(twice, twice).reshape([ROWS, 16 * GROUPS])
    ordered = gl.convert_layout(named, gl.DotOperandLayout(0, O, 4))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [ordered], gl.float8e4nv, True, 4
    )
