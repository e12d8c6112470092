"""The specification: attention with materialized scores, in plain PyTorch.

This is the "standard attention" of the comparison: O(Lq * Lk) memory.  It computes in float32
(float64 for float64 inputs), differentiates by autograd, and every other backend is tested
against it.  A key that a query does not attend to contributes nothing, whatever its contents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.core.kv import dense
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.masks import bias_of, seen_kv, visible_pairs
from saccade.ops.attention.varlen import per_sequence


def refusal(call: AttentionCall) -> str | None:
    """The reference runs everything."""
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """softmax(mask(softcap(scale * q k^T) + bias)) v, as written."""
    if call.cu_seqlens is not None:
        return per_sequence(call, run)
    length = call.q.shape[2]
    q = call.queries(0, length)
    tile = dense(call.kv)
    visible = visible_pairs(call, 0, length, tile)
    k, v = seen_kv(call, tile, visible, q.dtype)
    q = q.unflatten(1, (-1, call.num_groups))  # [B, Hkv, G, Lq, D]
    scores = q @ k[:, :, None].mT * call.scale  # [B, Hkv, G, Lq, Lk]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    bias = bias_of(call, 0, length, tile)
    scores = scores if bias is None else scores + bias
    scores = scores.where(visible, -torch.inf)
    weights, lse = _softmax(scores, call.sink_logits)
    out = _weighted_sum(weights, v, visible)
    return AttentionOutput(out.flatten(1, 2).to(call.out_dtype), lse.flatten(1, 2).float())


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax weights and lse over the last dimension; a row without visible keys weighs 0."""
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        peak = torch.zeros_like(lse)[..., None]
    else:
        peak = scores.detach().amax(-1, keepdim=True)
    total = torch.zeros_like(peak)
    if sink_logits is not None:  # one more column in the denominator, without a value
        sink = sink_logits.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1)
        peak = torch.maximum(peak, sink.detach())
        peak = peak.masked_fill(peak == -torch.inf, 0)
        total = total + (sink - peak).exp()
    peak = peak.masked_fill(peak == -torch.inf, 0)
    exps = (scores - peak).exp()
    total = total + exps.sum(-1, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    lse = (peak + safe.log()).masked_fill(empty, -torch.inf)
    return exps / safe, lse.squeeze(-1)


def _weighted_sum(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """weights @ v, where 0 weight of an unseen key is exactly nothing (0 * nan would be nan)."""
    values = v[:, :, None]
    if v.is_meta or v.isfinite().all():
        return weights @ values
    products = weights[..., None] * values[..., None, :, :]
    return products.where(visible[..., None], 0).sum(-2)
