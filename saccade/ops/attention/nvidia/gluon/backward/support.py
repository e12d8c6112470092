"""Which calls with gradients the Gluon kernels take.

Loaded on any machine, so nothing here imports Triton.
"""

from __future__ import annotations

import torch

from saccade.core import DenseKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.prefill.support import TILE_KEYS
from saccade.ops.attention.nvidia.gluon.support import layout_refusal, scale_refusal

DIMS = (64, 128)


def refusal(call: AttentionCall) -> str | None:
    """Why the Gluon kernels cannot compute the gradients of a call, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "its dQ is summed in no fixed order, and deterministic algorithms are enabled"
    if call.softcap is not None or call.alibi_slopes is not None:
        return "with gradients it supports no softcap and no alibi_slopes"
    return _refusal(call, DIMS)


def forward_refusal(call: AttentionCall) -> str | None:
    """Why the Gluon prefill kernel cannot compute the forward pass of a call, or None."""
    return _refusal(call, tuple(TILE_KEYS))


def _refusal(call: AttentionCall, dims: tuple[int, ...]) -> str | None:
    kv = call.kv
    if not (isinstance(kv, DenseKV) and kv.is_plain and call.is_plain):
        return "with gradients it supports only plain dense keys, window and sinks"
    assert isinstance(call.q_offset, int)
    reason = scale_refusal(call)
    if reason is not None:
        return reason
    if call.q.dtype not in (torch.bfloat16, torch.float16) or not (
        call.q.dtype == kv.k.dtype == kv.v.dtype
    ):
        return f"{call.q.dtype} is not one of bfloat16, float16"
    reason = layout_refusal((call.q, kv.k, kv.v), dims)
    if reason is not None:
        return reason
    if call.q_offset < 0 or call.q_offset + call.q.shape[2] > kv.shape[2]:
        return f"queries at {call.q_offset} onwards do not all have a key of their own"
    return None
