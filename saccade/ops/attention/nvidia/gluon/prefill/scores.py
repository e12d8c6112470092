"""S of the prefill kernel: the products q.k, capped by tanh and biased by ALiBi where a call asks.

Everything after it treats S as scores in some unit: a weight is 2^(S * scale_log2 - ...).  Without
a cap S is the plain product and scale_log2 is scale * log2(e).  With one, since

    softcap * tanh(x) = softcap - 2 * softcap / (e^(2 x) + 1),    x = scale * q.k / softcap,

S is -1 / (e^(2 x) + 1) and scale_log2 is 2 * softcap * log2(e), and the constant goes into the lse.
Exponentials and reciprocals are the bottleneck, so four scores share a reciprocal.  (`tanh.approx`
would be one instruction, and is wrong by 2^-11: by 0.02 in a score that is capped at 50.)

ALiBi adds -slope * |q_pos - k_pos|.  In causal calls keys never lie behind their query, so that is
slope * (k_pos - origin) for a column, and slope * (origin - q_pos) for a row, which goes into the
lse alone.
Source: Gemma 2, 2024 (arXiv 2408.00118); ALiBi, 2021 (arXiv 2108.12409).
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def by_eights(x):
    """`[ROWS, N]` as `[ROWS, N / 8, 8]`: a thread has all of the middle axis, so that sums and
    maxima over it need no exchange between threads."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def scores(q_tile, k_tile, s, DIM: gl.constexpr):
    """S = Q K^T of a tile of keys `[BLOCK_N, D]`, issued; columns from DIM on are zeros.

    A product of 192 columns is one of 128 and one of 64: a quarter less than the whole tile.
    """
    if k_tile.shape[1] == 256 and DIM <= 192:
        low = k_tile.slice(0, 128, dim=1).permute((1, 0))
        high = k_tile.slice(128, 64, dim=1).permute((1, 0))
        s = warpgroup_mma(q_tile.slice(0, 128, dim=1), low, s, use_acc=False, is_async=True)
        s = warpgroup_mma(q_tile.slice(128, 64, dim=1), high, s, is_async=True)
    else:
        s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)
    return s


@triton.constexpr_function
def _capped_asm():
    """-1 / (2^x + 1) of four numbers by one reciprocal, that of the product of their divisors.

    x counts as at most 30: the result is then less than 2^-30, the product less than 2^121.
    """
    lines = [".reg .f32 e<4>, p, q, r;"]
    for i in range(4):
        lines.append(f"min.ftz.f32 e{i}, ${4 + i}, 0f41F00000; ex2.approx.ftz.f32 e{i}, e{i};")
        lines.append(f"add.ftz.f32 e{i}, e{i}, 0f3F800000;")
    lines.append("mul.ftz.f32 p, e0, e1; mul.ftz.f32 q, e2, e3; mul.ftz.f32 r, p, q;")
    lines.append("neg.ftz.f32 r, r; rcp.approx.ftz.f32 r, r;")
    lines.append("mul.ftz.f32 q, q, r; mul.ftz.f32 p, p, r;")  # -1 / (e0 e1), -1 / (e2 e3)
    products = (("q", 1), ("q", 0), ("p", 3), ("p", 2))
    lines += [f"mul.ftz.f32 ${i}, {x}, e{j};" for i, (x, j) in enumerate(products)]
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def _capped(s):
    """-1 / (2^s + 1); wide heads, with tiles of 64 keys, have no registers left to do it by fours,
    and enough products to hide a reciprocal each."""
    if s.shape[1] <= 64:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; sub.ftz.f32 e, 0fBF800000, e; "
            "rcp.approx.ftz.f32 $0, e; }", "=f,f", [s], gl.float32, True, 1,
        )  # fmt: skip
    else:
        asm: gl.constexpr = _capped_asm()
        return gl.inline_asm_elementwise(asm, "=f,=f,=f,=f,f,f,f,f", [s], gl.float32, True, 4)


@gluon.jit
def _biased(s, slope, q_pos, k_start, origin, CAUSAL: gl.constexpr):
    """A tile of S with the ALiBi bias; keys behind the queries of a causal call are masked later.

    A thread has two columns of every eight: positions of the others follow by constants.
    """
    s8 = by_eights(s)
    L: gl.constexpr = s8.type.layout
    eight = gl.arange(0, s8.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    eight = (8 * eight).to(gl.float32)[None, :, None]
    if CAUSAL:
        first = (k_start - origin + within).to(gl.float32) * slope
        s8 = s8 + gl.fma(eight, slope, first[None, None, :])
    else:
        row = gl.convert_layout(q_pos - k_start, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        ahead = (row[:, None, None] - within[None, None, :]).to(gl.float32)
        s8 = s8 - slope * gl.abs(ahead - eight)
    return gl.convert_layout(s8.reshape(s.shape), s.type.layout)


@gluon.jit
def adjust(s, score_args, q_pos, k_start, CAUSAL: gl.constexpr):
    """S of a tile of keys from k_start on, out of the products q.k.

    Args:
        score_args: (cap_log2, slope, origin): the factor from a product to 2 x in powers of two, or
            None; the slope of the head in units of S, or None; the position of the first query.
    """
    cap_log2, slope, origin = score_args
    if cap_log2 is not None:
        s = _capped(s * cap_log2)
    if slope is not None:
        s = _biased(s, slope, q_pos, k_start, origin, CAUSAL)
    return s


@gluon.jit
def largest_log2(row_max, score_args, q_pos, scale_log2, CAUSAL: gl.constexpr):
    """The largest score of each row in powers of two: that of S, and what S leaves out of a row."""
    cap_log2, slope, origin = score_args
    largest = row_max * scale_log2
    if cap_log2 is not None:
        largest = largest + scale_log2 * 0.5
    if CAUSAL:
        if slope is not None:
            largest = largest + (origin - q_pos).to(gl.float32) * (slope * scale_log2)
    return largest
