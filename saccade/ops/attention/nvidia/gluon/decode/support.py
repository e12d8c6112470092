"""Which calls over plain dense or paged keys the Gluon kernel for few queries takes.

This module is what the backend loads, on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.support import in_steps, score_refusal

DIMS = (64, 128)
MOST_ROWS = 16  # query heads of a group times queries
PAGE = 16  # a tile of keys lies in one page
# What it was measured to win with (NVIDIA H200, lab/LOG_gpu_decode.md); rows by head_dim and
# whether keys lie in pages, where more than eight of them pay.
MEASURED_KEYS, MEASURED_WINDOW_DIM = 64, 128
MEASURED_ROWS = {(64, False): 8, (64, True): 8, (128, False): 8, (128, True): 16}


def reads(call: AttentionCall) -> bool:
    """Whether the kernel for few queries is the one for a call, over dense keys or pages."""
    kv = call.kv
    few = 0 < rows_of(call) <= MOST_ROWS and call.q.shape[3] in DIMS
    plain = isinstance(kv, PagedKV) or (isinstance(kv, DenseKV) and kv.is_plain)
    return plain and few and call.blocks is None and call.cu_seqlens is None


def rows_of(call: AttentionCall) -> int:
    """Rows that share their keys: query heads of a group times queries."""
    return call.num_groups * call.q.shape[2]


def unmeasured(call: AttentionCall) -> str | None:
    """Why `auto` leaves a call of few queries to others, or None."""
    rows, keys, dim = rows_of(call), call.kv.shape[2], call.q.shape[3]
    paged = isinstance(call.kv, PagedKV)
    most = MEASURED_ROWS[dim, paged]
    if call.mask.window is not None and (paged or dim != MEASURED_WINDOW_DIM):
        return (
            "for few queries windows were measured over dense keys of head_dim "
            f"{MEASURED_WINDOW_DIM} alone"
        )
    if keys >= MEASURED_KEYS and rows <= most:
        return None
    return (
        f"for few queries over such keys it was measured to win from {MEASURED_KEYS} of them on "
        f"and with up to {most} queries x heads of a group, here {keys} and {rows}"
    )


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    return _meaning(call) or _layout(call)


def _meaning(call: AttentionCall) -> str | None:
    if call.key_padding is not None or call.attn_mask is not None:
        return "for few queries it knows no key_padding and no attn_mask"
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
    if not in_steps(call.q, 4) or not all(in_steps(x, 16) for x in (kv.k, kv.v)):
        return "rows of keys have to begin at multiples of 16 bytes, of queries at multiples of 4"
    if call.q.numel() == 0 or kv.k.numel() == 0:
        return "there are no queries or no keys"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    from saccade.ops.attention.nvidia.gluon.decode.launch import run as launch

    return launch(call)
