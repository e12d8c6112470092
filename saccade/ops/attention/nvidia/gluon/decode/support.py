"""Which calls over plain dense keys or pages the Gluon decoding kernel takes.

Loaded on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.support import score_refusal
from saccade.ops.gpu.launching import aligned

DIMS = (64, 128)
MOST_ROWS = 16  # query heads of a group times queries
PAGE = 16  # a tile of keys lies in one page


def reads(call: AttentionCall) -> bool:
    """Whether a call has few enough rows for the decoding kernel, over dense keys or pages."""
    kv = call.kv
    few = 0 < call.group_rows <= MOST_ROWS and call.q.shape[3] in DIMS
    plain = isinstance(kv, PagedKV) or (isinstance(kv, DenseKV) and kv.is_plain)
    return plain and few and call.blocks is None and call.cu_seqlens is None


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    return _meaning(call) or _layout(call)


def _meaning(call: AttentionCall) -> str | None:
    if call.key_padding is not None or call.attn_mask is not None:
        return "with few queries it supports no key_padding and no attn_mask"
    return score_refusal(call)


def _layout(call: AttentionCall) -> str | None:
    kv = call.kv
    assert isinstance(kv, (DenseKV, PagedKV))
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"{call.q.dtype} is not one of bfloat16, float16"
    if kv.k.dtype != call.q.dtype or kv.v.dtype != call.q.dtype:
        return f"q is {call.q.dtype} but keys are {kv.dtype}"
    for dim in (call.q.shape[3], *kv.shape[3:]):
        if dim not in DIMS or dim != call.q.shape[3]:
            return f"head_dim {dim} is not one of {', '.join(map(str, DIMS))} for few queries"
    if isinstance(kv, PagedKV) and kv.page_size % PAGE:
        return f"pages have to hold {PAGE} n keys, got {kv.page_size}"
    if not aligned(call.q, 4) or not all(aligned(x, 16) for x in (kv.k, kv.v)):
        return "rows of keys have to begin at multiples of 16 bytes, of queries at multiples of 4"
    if call.q.numel() == 0 or kv.k.numel() == 0:
        return "there are no queries or no keys"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    from saccade.ops.attention.nvidia.gluon.decode.launch import run as launch

    return launch(call)
