"""The end of online softmax in the decoding kernels: lse and the divisor of the output."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.gpu.triton_lang import LN2, LOG2E


@gluon.jit
def finalize_softmax(row_max, row_sum, sink_logits, h, with_sink):
    """(lse, factor that the output is still rescaled by, sum it is divided by) of query rows.

    Args:
        row_max, row_sum: largest score, in powers of two, and sum of weights; a row that attends
            to nothing has the initial maximum and 0.
        h: query heads; their learned sinks count where `with_sink`, which is in one split of all.
    """
    rescale = row_sum * 0.0 + 1.0
    if sink_logits is not None:
        sink = gl.load(sink_logits + h, mask=with_sink, other=float("-inf")) * LOG2E
        new_max = gl.maximum(row_max, sink)
        rescale = gl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + gl.exp2(sink - new_max)
        row_max = new_max
    divisor = gl.where(row_sum == 0, 1.0, row_sum)
    lse = gl.where(row_sum == 0, float("-inf"), (row_max + gl.log2(divisor)) * LN2)
    return lse, rescale, divisor
