"""Which calls over quantized keys the Gluon decoding kernel takes.

Loaded on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, GrowingKV, QuantizedKV
from saccade.core.kv import KVView
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.support import score_refusal

DIMS = (64, 128)
KEY_GROUP = 64
KEYS_OF_A_LANE = 8
MOST_ROWS = 128  # query heads of a group times queries; more of them is prefill


def reads(kv: KVView) -> bool:
    """Whether a view holds quantized keys."""
    return isinstance(kv, (QuantizedKV, GrowingKV))


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call over quantized keys, or None."""
    return _meaning(call) or _layout(call, stored(call))


def stored(call: AttentionCall) -> QuantizedKV:
    """The quantized storage of a view."""
    if isinstance(call.kv, GrowingKV):
        return call.kv.stored
    assert isinstance(call.kv, QuantizedKV)
    return call.kv


def _meaning(call: AttentionCall) -> str | None:
    extras = (call.key_padding, call.attn_mask, call.cu_seqlens)
    if any(extra is not None for extra in extras):
        return "over quantized keys it supports no key_padding, attn_mask or cu_seqlens"
    if isinstance(call.kv, GrowingKV) and (call.kv_lens is None or call.blocks is not None):
        return "a growing view takes kv_lens and no blocks"
    if call.blocks is not None and call.blocks.k_block % KEYS_OF_A_LANE:
        return (
            f"over quantized keys it takes blocks of {KEYS_OF_A_LANE} n keys, "
            f"got {call.blocks.k_block}"
        )
    reason = score_refusal(call)
    if reason is not None:
        return reason
    rows = call.group_rows
    if not 0 < rows <= MOST_ROWS:
        return (
            f"over quantized keys it takes 1 to {MOST_ROWS} queries x heads of a group, got {rows}"
        )
    return None


def _layout(call: AttentionCall, kv: QuantizedKV) -> str | None:
    if call.q.dtype not in (torch.bfloat16, torch.float16) or call.q.dtype != kv.dtype:
        return f"{call.q.dtype} is not one of bfloat16, float16, or not the dtype of recent keys"
    for dim in (call.q.shape[3], kv.shape[4]):
        if dim not in DIMS or dim != call.q.shape[3]:
            return f"head_dim {dim} is not one of {', '.join(map(str, DIMS))} over quantized keys"
    if kv.k_group % KEY_GROUP or kv.v.scale.shape[3] not in (1, 2):
        return (
            f"keys need groups of {KEY_GROUP} n tokens and values one or two groups, "
            f"got {kv.k_group} and {kv.v.scale.shape[3]}"
        )
    if not all(_in_rows(x) for x in (*kv.k, *kv.v)):
        return (
            "quantized numbers and scales have to lie row after row, heads at multiples of 16 bytes"
        )
    return None


def _in_rows(x: Tensor) -> bool:
    """Rows without gaps, heads and batches at multiples of 16 bytes."""
    steps = [x.stride(i) * x.element_size() for i in (0, 1) if x.shape[i] > 1]
    return (
        x.stride(3) == 1
        and (x.shape[2] < 2 or x.stride(2) == x.shape[3])
        and x.data_ptr() % 16 == 0
        and all(step % 16 == 0 for step in steps)
    )


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts; recent keys are read by the split-KV kernel."""
    from saccade.ops.attention.nvidia.gluon.quantized_decode.launch import READER
    from saccade.ops.attention.nvidia.triton.quantized_decode_launch import attend_quantized

    return attend_quantized(call, READER)
