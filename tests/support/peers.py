"""Fakes of the packages behind the backends fa3, fa4, flash_attn and flashinfer.

They have the published signatures, demand what the packages demand of their tensors, return what
those return (layouts, LSE to base 2, +inf for rows that see nothing) and compute by definition.
Sources: the schema and flags of fa3-fwd 0.0.3, flash_attn/cute/interface.py of flash-attn-4
4.0.0b36, flash_attn_interface.py of flash-attn 2.8 and of its folder hopper, flashinfer 0.7.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.ops.attention import known
from saccade.ops.attention.peers import fa3, fa4, flash_attn, flashinfer, installed

FWD = """q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k
max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary
q_descale k_descale v_descale softmax_scale is_causal window_size_left window_size_right
attention_chunk softcap is_rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin"""
FA3_FWD_FLAGS = {  # of the package fa3-fwd
    "FLASHATTENTION_DISABLE_BACKWARD": True, "FLASHATTENTION_DISABLE_SPLIT": False,
    "FLASHATTENTION_DISABLE_PAGEDKV": True, "FLASHATTENTION_DISABLE_LOCAL": True,
    "FLASHATTENTION_DISABLE_SOFTCAP": False, "FLASHATTENTION_DISABLE_FP16": True,
    "FLASHATTENTION_DISABLE_VARLEN": False, "FLASHATTENTION_DISABLE_HDIM64": False,
    "FLASHATTENTION_DISABLE_HDIM96": False, "FLASHATTENTION_DISABLE_HDIM128": False,
    "FLASHATTENTION_DISABLE_HDIM192": False, "FLASHATTENTION_DISABLE_HDIM256": False,
    "FLASH_ATTENTION_DISABLE_HDIMDIFF64": False, "FLASH_ATTENTION_DISABLE_HDIMDIFF192": False,
}  # fmt: skip


def by_definition(
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    *,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(`[L, H, Dv]`, lse `[H, L]`) of q `[L, H, D]`, k and v `[Lk, Hkv, ..]`, in float64."""
    demand(*tensors)
    q, k, v = (x.double() for x in tensors)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    at = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    behind = at - torch.arange(k.shape[0])
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * behind.abs()
    (left, right), seen = window, torch.ones_like(behind, dtype=torch.bool)
    right = 0 if causal else right
    seen = seen & (behind <= left) if left >= 0 else seen
    seen = seen & (behind >= -right) if right >= 0 else seen
    scores = scores.masked_fill(~seen, -torch.inf)
    some = seen.any(-1)
    safe = torch.where(some[:, None], scores, 0.0)
    weights = safe.softmax(-1).masked_fill(~some[:, None], 0.0)
    lse = safe.logsumexp(-1).masked_fill(~some, -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v).to(tensors[0].dtype), lse.float()


def demand(*tensors: Tensor) -> None:
    """16 bits, a unit last stride and all others at multiples of 16 bytes, as TMA needs them."""
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % 8 == 0
        *steps, unit = x.stride()
        assert unit == 1 and all(step > 0 and step % 8 == 0 for step in steps), x.stride()


def batched(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same of tensors `[B, L, H, D]`; lse `[B, H, L]`."""
    demand(q, k, v)
    rows = range(q.shape[0])
    of_row = [None] * len(rows) if slopes is None else slopes.expand(len(rows), -1)
    parts = [by_definition((q[i], k[i], v[i]), scale, slopes=of_row[i], **options) for i in rows]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def packed(
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The same of sequences `[total, H, D]`; lse `[H, total]`."""
    (q, k, v), parts = tensors, []
    demand(q, k, v)
    for cu, most in zip(bounds, longest, strict=True):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.diff().max() <= most
    for i in range(len(bounds[0]) - 1):
        a, b, c, d = *bounds[0][i : i + 2], *bounds[1][i : i + 2]
        parts.append(by_definition((q[a:b], k[c:d], v[c:d]), scale, **options))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def plus_for_nothing(lse: Tensor) -> Tensor:
    """FlashAttention-2's lse of rows that see nothing."""
    return lse.masked_fill(lse.isneginf(), torch.inf)


def fa3_fwd(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """The operator `fwd` of FlashAttention-3."""
    assert set(given) <= set(re.findall(r"\w+", FWD))
    options = {
        "causal": given["is_causal"], "softcap": given["softcap"],
        "window": (given["window_size_left"], given["window_size_right"]),
    }  # fmt: skip
    scale = given["softmax_scale"]
    if "q_v" in given:  # softmax(q k + q_v v) v
        demand(q, k, v, given["q_v"])
        assert 256 <= v.shape[-1] <= 512 and k.shape[-1] <= 64
        q, k = torch.cat((given["q_v"], q), -1), torch.cat((v, k), -1)
    if "cu_seqlens_q" in given:
        bounds = given["cu_seqlens_q"], given["cu_seqlens_k"]
        longest = given["max_seqlen_q"], given["max_seqlen_k"]
        found = packed((q, k, v), scale, bounds, longest, **options)
    else:
        found = batched(q, k, v, scale, **options)
    return *found, torch.empty(0), torch.empty(0)


def fa3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_func of FlashAttention-3."""
    out, lse = batched(
        q, k, v, softmax_scale, causal=causal, window=window_size, softcap=softcap
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def fa3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_varlen_func of FlashAttention-3, of a release that always returns the lse."""
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"causal": causal, "window": window_size, "softcap": softcap}
    return packed((q, k, v), softmax_scale, bounds, longest, **options)


def fa4_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    """flash_attn_func of FlashAttention-4."""
    out, lse = batched(
        q, k, v, softmax_scale, causal=causal, window=window_size, softcap=softcap
    )  # fmt: skip
    return out, lse if return_lse or q.requires_grad else None


def fa4_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    """flash_attn_varlen_func of FlashAttention-4."""
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"causal": causal, "window": window_size, "softcap": softcap}
    out, lse = packed((q, k, v), softmax_scale, bounds, longest, **options)
    return out, lse if return_lse or q.requires_grad else None


def fa2_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_func of FlashAttention-2."""
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    out, lse = batched(
        q, k, v, softmax_scale, alibi_slopes, causal=causal, window=window_size, softcap=softcap
    )  # fmt: skip
    return (out, plus_for_nothing(lse), None) if return_attn_probs else out


def fa2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash_attn_varlen_func of FlashAttention-2."""
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"causal": causal, "window": window_size, "softcap": softcap}
    out, lse = packed((q, k, v), softmax_scale, bounds, longest, slopes=alibi_slopes, **options)
    return (out, plus_for_nothing(lse), None) if return_attn_probs else out


def fa2_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """flash_attn_with_kvcache of FlashAttention-2: rows of a cache, or pages of 256 n slots."""
    assert cache_seqlens.dtype == torch.int32
    assert block_table is None or (block_table.dtype == torch.int32 and k_cache.shape[1] % 256 == 0)
    parts = []
    for i, length in enumerate(cache_seqlens.tolist()):
        rows = (k_cache[i], v_cache[i])
        if block_table is not None:
            pages = block_table[i, : -(-length // k_cache.shape[1])].long()
            rows = (k_cache[pages].flatten(0, 1), v_cache[pages].flatten(0, 1))
        tensors = (q[i], *(x[:length] for x in rows))
        parts.append(by_definition(tensors, softmax_scale, causal=causal, softcap=softcap))
    out, lse = torch.stack([x for x, _ in parts]), torch.stack([x for _, x in parts])
    return (out, plus_for_nothing(lse)) if return_softmax_lse else out


def single_prefill_with_kv_cache(
    q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
    packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
    use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
    rope_scale=None, rope_theta=None, backend="auto", return_lse=False, kv_cache_sf=None,
    k_scale=None, v_scale=None,
):  # fmt: skip
    """FlashInfer's attention of one request; lse to base 2, `[L, H]`."""
    assert kv_layout == "NHD" and (k.shape[0] >= q.shape[0] or not causal)
    window, softcap = (window_left, -1), logits_soft_cap or 0.0
    out, lse = by_definition((q, k, v), sm_scale, causal=causal, window=window, softcap=softcap)
    return (out, lse.T / math.log(2)) if return_lse else out


MODULES = {
    "flash_attn_interface": SimpleNamespace(
        flash_attn_func=fa3_func, flash_attn_varlen_func=fa3_varlen_func
    ),
    "fa3_fwd_interface": SimpleNamespace(),
    "flash_attn_config": SimpleNamespace(CONFIG={"build_flags": {}}),
    "fa3_fwd_config": SimpleNamespace(CONFIG={"build_flags": FA3_FWD_FLAGS}),
    fa4.MODULE: SimpleNamespace(flash_attn_func=fa4_func, flash_attn_varlen_func=fa4_varlen_func),
    flash_attn.MODULE: SimpleNamespace(
        flash_attn_func=fa2_func,
        flash_attn_varlen_func=fa2_varlen_func,
        flash_attn_with_kvcache=fa2_with_kvcache,
    ),
    flashinfer.MODULE: SimpleNamespace(single_prefill_with_kv_cache=single_prefill_with_kv_cache),
}


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *, without: tuple[str, ...] = ()) -> None:
    """Let the fakes be what is installed, on a GPU.

    Args:
        without: top-level modules that are not there.
    """
    known.clear()
    monkeypatch.setattr(installed, "gpu_refusal", lambda *_: None)
    monkeypatch.setattr(installed, "is_found", lambda module, file="": module not in without)
    monkeypatch.setattr(installed, "_tried", MODULES.__getitem__)
    monkeypatch.setattr(fa3, "_operators", lambda build: SimpleNamespace(fwd=fa3_fwd))
