"""S of the prefill kernel: the products q.k, capped by tanh and biased by ALiBi where a call asks.

Everything after it treats S as scores in some unit: a weight is 2^(S * scale_log2 - ...).  Without
a cap S is the plain product and scale_log2 is scale * log2(e).  With one, since

    softcap * tanh(x) = softcap - 2 * softcap / (e^(2 x) + 1),    x = scale * q.k / softcap,

S is -1 / (e^(2 x) + 1) and scale_log2 is 2 * softcap * log2(e), and the constant goes into the lse.
Exponentials and reciprocals are the bottleneck, so two scores share a reciprocal.  (`tanh.approx`
would be one instruction, and is wrong by 2^-11: by 0.02 in a score that is capped at 50.)

ALiBi adds -slope * |q_pos - k_pos|.  In causal calls keys never lie behind their query, so that is
slope * (k_pos - origin) for a column, and slope * (origin - q_pos) for a row, which goes into the
lse alone.
Source: Gemma 2, 2024 (arXiv 2408.00118); ALiBi, 2021 (arXiv 2108.12409).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from saccade.ops.gpu.triton_lang import LOG2E


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


_CAPPED = gl.constexpr(
    "{ .reg .f32 x, y, r; "
    "min.ftz.f32 x, $2, 0f42700000; ex2.approx.ftz.f32 x, x; add.ftz.f32 x, x, 0f3F800000; "
    "min.ftz.f32 y, $3, 0f42700000; ex2.approx.ftz.f32 y, y; add.ftz.f32 y, y, 0f3F800000; "
    "mul.ftz.f32 r, x, y; neg.ftz.f32 r, r; rcp.approx.ftz.f32 r, r; "
    "mul.ftz.f32 $0, r, y; mul.ftz.f32 $1, r, x; }"
)


@gluon.jit
def _capped(s):
    """-1 / (2^s + 1), of two scores by the reciprocal of the product of their divisors.

    s counts as at most 60: the result is then 2^-60 instead of less, and no product overflows.
    """
    return gl.inline_asm_elementwise(_CAPPED, "=&f,=&f,f,f", [s], gl.float32, True, 2)


@gluon.jit
def _biased(s, slope, q_pos, starts, origin, CAUSAL: gl.constexpr, PARTS: gl.constexpr):
    """A tile of S with the ALiBi bias; keys behind the queries of a causal call are masked later.

    A thread has two columns of every eight: positions of the others in a part of the tile follow by
    constants.
    """
    s8 = by_eights(s)
    L: gl.constexpr = s8.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    WIDTH: gl.constexpr = s.shape[1] // PARTS
    eight = gl.arange(0, s8.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    eight = (8 * eight)[None, :, None]
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    k_start = starts[0]
    for i in gl.static_range(1, PARTS):
        k_start = gl.where(eight < i * WIDTH, k_start, starts[i] - i * WIDTH)
    eight = eight.to(gl.float32)
    slope = gl.convert_layout(slope, ROW)[:, None, None]
    if CAUSAL:
        s8 = s8 + slope * ((k_start - origin + within).to(gl.float32) + eight)
    else:
        row = gl.convert_layout(q_pos, ROW)[:, None, None] - k_start
        s8 = s8 - slope * gl.abs((row - within).to(gl.float32) - eight)
    return gl.convert_layout(s8.reshape(s.shape), s.type.layout)


@gluon.jit
def slope_of_rows(alibi, b, h, head, scale_log2):
    """The ALiBi slope of each row in units of S: that of head h + head in row b of the batch."""
    slopes, batch_stride = alibi
    at = slopes + b.to(gl.int64) * batch_stride + h + head
    return gl.load(at) * (LOG2E / scale_log2)


@gluon.jit
def adjust(s, score_args, q_pos, starts, CAUSAL: gl.constexpr, PARTS: gl.constexpr):
    """S of a tile of keys whose parts begin at `starts`, out of the products q.k.

    Args:
        score_args: (cap_log2, slope, origin): the factor from a product to 2 x in powers of two, or
            None; the slope of each row in units of S, or None; the position of the first query.
    """
    cap_log2, slope, origin = score_args
    if cap_log2 is not None:
        s = _capped(s * cap_log2)
    if slope is not None:
        s = _biased(s, slope, q_pos, starts, origin, CAUSAL, PARTS)
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
