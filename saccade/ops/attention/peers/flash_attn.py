"""Backend `flash_attn`: FlashAttention-2 of the package flash-attn, from Ampere on.

PyTorch has a version of it too (backend `sdpa`), without windows, softcap, ALiBi, packed sequences,
pages and lengths of rows.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.problem import paged_kv_lens
from saccade.ops.attention.peers import installed
from saccade.ops.attention.peers.problem import (
    dims_refusal,
    forward_of,
    needs_lse,
    pattern_of,
    peer_call,
    result,
    shared_refusal,
    tokens,
)
from saccade.ops.gpu.launching import aligned, float32

EXTENSION, MODULE = "flash_attn_2_cuda", "flash_attn.flash_attn_interface"
PAGE = 256  # slots that a page has to be a multiple of
CAPABILITIES = (installed.AMPERE, (12, 1))


def refusal(call: AttentionCall) -> str | None:
    """Why FlashAttention-2 cannot run this call, or None."""
    reason = installed.refusal(call.q.device, CAPABILITIES, "flash-attn", EXTENSION)
    if reason is not None:
        return reason
    reason = shared_refusal(call, lens=True) or dims_refusal(call) or _own_refusal(call)
    reason = reason or installed.import_refusal(MODULE)
    if reason is None and "softcap" not in signature(_function("flash_attn_func")).parameters:
        reason = "it needs flash-attn 2.6 or newer"
    return reason


def _own_refusal(call: AttentionCall) -> str | None:
    kv, slopes = call.kv, call.alibi_slopes
    if kv.shape[3] != kv.shape[4]:
        return "it needs value_dim equal to head_dim"
    if isinstance(kv, PagedKV) and (kv.page_size % PAGE or not _in_place(kv)):
        return f"it needs pages of a multiple of {PAGE} slots that lie at multiples of 16 bytes"
    if slopes is None:
        return None
    if call.needs_grad and slopes.requires_grad:
        return "alibi_slopes get no gradient"
    at_end = call.cu_seqlens is not None or call.q_offset == kv.shape[2] - call.q.shape[2]
    if not at_end or call.kv_lens is not None or isinstance(kv, PagedKV):
        return "with alibi_slopes it takes the last query for that of the last key"
    return None


def _in_place(kv: PagedKV) -> bool:
    return aligned(kv.k, 16) and aligned(kv.v, 16)


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by FlashAttention-2; gradients by its own backward pass."""
    if call.kv_lens is not None or isinstance(call.kv, PagedKV):
        out, lse = _over_lengths(call)
        return result(call, out, _without_plus(lse))
    given = peer_call(call)
    options = given.options() | {"alibi_slopes": float32(call.alibi_slopes)}
    options["deterministic"] = call.needs_grad and torch.are_deterministic_algorithms_enabled()
    tensors = (given.q, given.k, given.v)
    if given.cu_q is None:
        out, lse, _ = _function("flash_attn_func")(*tensors, return_attn_probs=True, **options)
    else:
        options |= given.lengths() | {"return_attn_probs": True}
        out, lse, _ = _function("flash_attn_varlen_func")(*tensors, **options)
    empty_rows = given.cu_q is not None or call.q.shape[2] > call.kv.shape[2]
    if not needs_lse(call):
        return result(call, out, None)
    return result(call, out, _without_plus(lse) if empty_rows else lse)


def _over_lengths(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Rows with lengths of their own, all keys of which every query sees: by its cache function."""
    kv, pattern = call.kv, pattern_of(call)
    assert not isinstance(pattern, str) and not pattern.causal
    options: dict[str, Any] = {"softmax_scale": call.scale, "softcap": call.softcap or 0.0}
    if isinstance(kv, PagedKV):
        k, v, lens = kv.k.transpose(1, 2), kv.v.transpose(1, 2), paged_kv_lens(call)
        options["block_table"] = kv.page_table
    else:
        assert isinstance(kv, DenseKV) and call.kv_lens is not None
        k, v, lens = tokens(kv.k), tokens(kv.v), call.kv_lens
    options["cache_seqlens"] = lens.to(torch.int32).contiguous()
    attend = _function("flash_attn_with_kvcache")
    out, lse = attend(tokens(call.q), k, v, return_softmax_lse=True, **options)
    return out, lse


def _without_plus(lse: Tensor) -> Tensor:
    """Rows that attend to nothing have an lse of +inf there."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def _function(name: str) -> Any:
    return getattr(installed.load(MODULE), name)


forward = forward_of(run)
