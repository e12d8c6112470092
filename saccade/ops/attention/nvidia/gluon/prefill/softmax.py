"""Online softmax of the prefill kernel, and what it does to O between two tiles of keys.

The maximum that weights refer to follows the true one only when that has grown by more than LARGEST
powers of two.  Until then weights are at most 2^LARGEST instead of 1, which costs neither range nor
relative precision, and O need not be rescaled: the rule after the first tiles of keys.
Source: Dao, FlashAttention-2, 2023 (arXiv 2307.08691); the late maximum: FlashAttention-4, 2026
(arXiv 2603.05451).
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.prefill.scores import by_eights, largest_log2
from saccade.ops.gpu.triton_lang import LN2, LOG2E

LARGEST = gl.constexpr(8.0)


@gluon.jit
def online_softmax(s, row_max, scale_log2):
    """A tile of S against the running maximum: (P, row_max, row sums, rescale of O and sums).

    Each thread keeps row sums of its own, `[ROWS, 8]`, which are reduced at the end of a work tile.
    """
    ROW: gl.constexpr = row_max.type.layout
    top = gl.convert_layout(gl.max(gl.max(by_eights(s), 1), 1), ROW)
    grows = (top - row_max) * scale_log2 > LARGEST
    new_max = gl.where(grows, top, row_max)
    p = gl.exp2(s * scale_log2 - (new_max * scale_log2)[:, None])
    rescale = gl.exp2((row_max - new_max) * scale_log2)
    return p, new_max, gl.sum(by_eights(p), 1), rescale


@gluon.jit
def add_sums(row_sum, sums, rescale):
    """Running row sums, several columns to a row, after another tile of keys."""
    SUMS: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    return row_sum * gl.convert_layout(rescale, SUMS)[:, None] + sums


@triton.constexpr_function
def _rescale_asm(count):
    """O times its factor, unless the factors of all rows of the warp are 1.

    In the layout of wgmma elements 0 and 1 of four lie in one row, elements 2 and 3 in another.
    """
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    first, second = 2 * count, 2 * count + 2
    return (
        "{ .reg .pred p, q; "
        f"setp.neu.f32 p, ${first}, 0f3F800000; setp.neu.f32 q, ${second}, 0f3F800000; "
        "or.pred p, p, q; vote.sync.any.pred p, p, -1; @!p bra DONE; "
        f"{products} DONE: }}"
    )


@triton.constexpr_function
def _rescale_constraints(count):
    parts = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return ",".join(parts)


@gluon.jit
def rescale_o(o, rescale):
    """O times a factor a row, skipped by warps whose factors are all 1."""
    factors = gl.convert_layout(rescale, gl.SliceLayout(1, o.type.layout))[:, None]
    COUNT: gl.constexpr = o.shape[0] * o.shape[1] // (32 * gl.num_warps())
    asm: gl.constexpr = _rescale_asm(COUNT)
    constraints: gl.constexpr = _rescale_constraints(COUNT)
    return gl.inline_asm_elementwise(asm, constraints, [o, factors], gl.float32, True, COUNT)


@gluon.jit
def add_sink(o, max_log2, row_sum, sink_logits, h):
    """(O, max_log2, row_sum) with the learned sink logit of head h as one more score a row.

    Args:
        max_log2: what weights refer to, in powers of two; row_sum: of all weights of a row.
    """
    sink = gl.load(sink_logits + h) * LOG2E
    new_max = gl.maximum(max_log2, sink)
    rescale = gl.exp2(max_log2 - new_max)
    row_sum = row_sum * rescale + gl.exp2(sink - new_max)
    o = o * gl.convert_layout(rescale, gl.SliceLayout(1, o.type.layout))[:, None]
    return o, new_max, row_sum


@gluon.jit
def normalize(
    o, row_max, row_sum, scale_log2, score_args, q_pos, sink_logits, h, CAUSAL: gl.constexpr
):
    """O divided by its row sums `[ROWS, 8]`, and the lse; an empty row is 0, its lse -inf."""
    ROW: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_max.type.layout)
    max_log2 = largest_log2(row_max, score_args, q_pos, scale_log2, CAUSAL)
    if sink_logits is not None:
        o, max_log2, row_sum = add_sink(o, max_log2, row_sum, sink_logits, h)
    empty = row_sum == 0.0
    divisor = gl.where(empty, 1.0, row_sum)
    o = o * gl.convert_layout(1.0 / divisor, ROW)[:, None]
    return o, gl.where(empty, float("-inf"), (max_log2 + gl.log2(divisor)) * LN2)
