"""Attention over fp8 queries, keys and values by a Gluon kernel on Hopper GPUs, for inference.

This module is what the chooser loads, on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch

from saccade.core import AttentionOutput, ScaledKV
from saccade.core.formats import FP8
from saccade.core.scaled import scale_of
from saccade.ops.attend.gluon import copyable, missing
from saccade.ops.call import AttentionCall

DIMS = (64, 128)


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    if call.q.dtype != FP8 or not isinstance(call.kv, ScaledKV):
        return "it knows float8_e4m3fn queries, keys and values alone (saccade.quantize_heads)"
    return missing(call.q.device) or _problem_refusal(call) or _layout_refusal(call)


def _problem_refusal(call: AttentionCall) -> str | None:
    """What the kernel does not compute."""
    assert isinstance(call.kv, ScaledKV)
    if not call.kv.codes.is_plain or not call.is_plain:
        return "it knows plain dense keys, causal or not, with window and sinks, and nothing else"
    if call.softcap is not None or call.alibi_slopes is not None:
        return "it knows no softcap and no alibi_slopes"
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    if call.needs_grad or torch.compiler.is_compiling():
        return "it has no gradient and no torch.compile registration"
    assert isinstance(call.q_offset, int)
    if call.q_offset < 0 or call.q_offset + call.q.shape[2] > call.kv.shape[2]:
        return f"queries at {call.q_offset} onwards do not all have a key of their own"
    return None


def _layout_refusal(call: AttentionCall) -> str | None:
    """What the copy engine and the matrix units do not take."""
    assert isinstance(call.kv, ScaledKV)
    codes = call.kv.codes
    for x in (call.q, codes.k, codes.v):
        if x.shape[3] not in DIMS or x.shape[3] != call.q.shape[3]:
            return f"head_dim {x.shape[3]} is not one of {', '.join(map(str, DIMS))}"
        if not copyable(x):
            return "the copy engine needs rows at distinct multiples of 16 bytes"
    if call.q.numel() == 0 or call.kv.shape[2] == 0:
        return "there are no queries or no keys"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts; the output is bfloat16."""
    from saccade.ops.attend.gluon_fp8_launch import forward
    from saccade.ops.attend.triton_problem import problem_of

    assert isinstance(call.kv, ScaledKV)
    q_scale = scale_of(call.q) if call.q_scale is None else call.q_scale
    problem = problem_of(call, call.kv.codes.k, call.kv.codes.v, None)
    return forward(problem, (q_scale, call.kv.k_scale, call.kv.v_scale))
