"""Which calls over plain dense or paged keys the Gluon kernel for few queries takes.

This module is what the backend loads, on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.call import AttentionCall

DIMS = (64, 128)
MOST_ROWS = 8  # query heads of a group times queries
PAGE = 16  # a tile of keys lies in one page
MEASURED_DIM, MEASURED_KEYS = 128, 8192


def reads(call: AttentionCall) -> bool:
    """Whether the kernel for few queries is the one for a call, over dense keys or pages."""
    kv = call.kv
    few = 0 < rows_of(call) <= MOST_ROWS and call.q.shape[3] in DIMS
    plain = isinstance(kv, PagedKV) or (isinstance(kv, DenseKV) and kv.is_plain)
    return plain and few and call.blocks is None


def rows_of(call: AttentionCall) -> int:
    """Rows that share their keys: query heads of a group times queries."""
    return call.num_groups * call.q.shape[2]


def unmeasured(call: AttentionCall) -> str | None:
    """Why `auto` leaves a call of few queries to others, or None."""
    dim, keys = call.q.shape[3], call.kv.shape[2]
    if dim == MEASURED_DIM and keys >= MEASURED_KEYS and call.mask.window is None:
        return None
    return (
        f"for few queries it was measured to win with head_dim {MEASURED_DIM}, from "
        f"{MEASURED_KEYS} keys on and without a window; here head_dim is {dim}, keys are {keys} "
        f"and the window is {call.mask.window}"
    )


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    return _meaning(call) or _layout(call)


def _meaning(call: AttentionCall) -> str | None:
    if call.softcap is not None or call.alibi_slopes is not None:
        return "for few queries it knows no softcap and no alibi_slopes"
    extras = (call.key_padding, call.blocks, call.attn_mask, call.cu_seqlens)
    if any(extra is not None for extra in extras):
        return "for few queries it knows no key_padding, blocks, attn_mask or cu_seqlens"
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    if call.needs_grad or torch.compiler.is_compiling():
        return "it has no gradient and no torch.compile registration"
    return None


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
    if not _in_steps(call.q, 4) or not all(_in_steps(x, 16) for x in (kv.k, kv.v)):
        return "rows of keys have to begin at multiples of 16 bytes, of queries at multiples of 4"
    if call.q.numel() == 0 or kv.k.numel() == 0:
        return "there are no queries or no keys"
    return None


def _in_steps(x: Tensor, step: int) -> bool:
    """Unit last stride, and all others multiples of `step` bytes."""
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return x.stride(3) == 1 and x.data_ptr() % step == 0 and all(s % step == 0 for s in steps)


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    from saccade.ops.attend.gluon.decode_launch import run as launch

    return launch(call)
