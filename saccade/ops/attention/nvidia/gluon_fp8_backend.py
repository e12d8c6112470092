"""Attention over fp8 queries, keys and values by a Gluon kernel on Hopper GPUs, for inference.

`dispatch` loads this module on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

from saccade.core import AttentionOutput, DenseKV, PerHeadFP8KV
from saccade.core.formats import FP8
from saccade.core.fp8 import scale_of
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.support import layout_refusal, score_refusal
from saccade.ops.gpu.support import gluon_refusal

DIMS = (64, 128)


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    if call.q.dtype != FP8 or not isinstance(call.kv, PerHeadFP8KV):
        return (
            "it takes only float8_e4m3fn queries, keys and values (saccade.quantize_fp8_per_head)"
        )
    qdata = call.kv.qdata
    tensors = (call.q, qdata.k, qdata.v)
    return (
        gluon_refusal(call.q.device)
        or _problem_refusal(call, qdata)
        or layout_refusal(tensors, DIMS)
    )


def _problem_refusal(call: AttentionCall, qdata: DenseKV) -> str | None:
    """What the kernel does not compute."""
    if not qdata.is_plain or not call.is_plain:
        return "it supports only plain dense keys, causal or not, with window and sinks"
    reason = score_refusal(call)
    if reason is not None:
        return reason
    if call.needs_grad:
        return "it has no gradient"
    assert isinstance(call.q_offset, int)
    if call.q_offset < 0 or call.q_offset + call.q.shape[2] > call.kv.shape[2]:
        return f"queries at {call.q_offset} onwards do not all have a key of their own"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts; the output is bfloat16."""
    from saccade.ops.attention.nvidia.gluon.fp8.launch import forward
    from saccade.ops.attention.nvidia.problem import problem_of

    assert isinstance(call.kv, PerHeadFP8KV)
    q_scale = scale_of(call.q) if call.q_scale is None else call.q_scale
    problem = problem_of(call, call.kv.qdata.k, call.kv.qdata.v, None)
    return forward(problem, (q_scale, call.kv.k_scale, call.kv.v_scale))
