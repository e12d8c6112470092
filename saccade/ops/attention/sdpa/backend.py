"""Attention through PyTorch's scaled_dot_product_attention kernels.

Three shapes of call run by a fused kernel without any mask in memory: a square causal prefill, a
call in which all queries attend to all keys, and a single new token (whose query heads are packed
as rows, so that a group reads its KV head once).  All others run by tiles of queries: each with the
keys that it attends to and a mask of that tile alone.  On CPU the kernel is called directly
because that form returns the lse and supports GQA; on a GPU each kernel is called by name
(sdpa_gpu).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import AttentionOutput, KeyRange
from saccade.core.formats import FP8
from saccade.core.kv import DenseKV, KVTile, joined
from saccade.core.quantized_kv import GrowingKV, QuantizedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.combine import with_sink_logits
from saccade.ops.attention.first_order import first_order
from saccade.ops.attention.masks import bias_of, seen_kv, visible_pairs
from saccade.ops.attention.sdpa import gpu as sdpa_gpu
from saccade.ops.attention.sdpa.workspace import kernel_bytes
from saccade.ops.attention.tiled import visible_tiles
from saccade.ops.attention.varlen import per_sequence
from saccade.ops.attention.watch import is_watched
from saccade.ops.planning import note_workspace, planning

Q_TILE = 512


def refusal(call: AttentionCall) -> str | None:
    """Why PyTorch's kernels cannot run this call, or None."""
    if call.softcap is not None:
        return "PyTorch's kernels have no softcap"
    if call.q.dtype == FP8:
        return "PyTorch's kernels have no fp8"
    # Keys of a quantized cache become q's dtype tile by tile, the newest among them, too.
    widened = isinstance(call.kv, (QuantizedKV, GrowingKV)) and call.q.device.type == "cpu"
    for x in () if widened else call.kv.floats[:2]:  # keys and values
        if call.q.dtype != x.dtype:
            return f"q is {call.q.dtype} but keys or values are {x.dtype}"
    if call.needs_grad and (call.sink_logits is not None or call.wants_lse):
        return "PyTorch's lse has no gradient"
    if call.needs_grad and call.alibi_slopes is not None and call.alibi_slopes.requires_grad:
        return "alibi_slopes get no gradient"
    if call.q.device.type == "cuda":
        return _gpu_refusal(call)
    if call.q.shape[3] != call.kv.shape[4]:
        return "PyTorch's CPU kernel needs value_dim equal to head_dim"
    if call.q.device.type != "cpu" and (call.wants_lse or call.sink_logits is not None):
        return "PyTorch's public API does not return the lse on this device"
    return None


def _gpu_refusal(call: AttentionCall) -> str | None:
    """On a GPU: why no fused kernel runs it; PyTorch itself would materialize the scores."""
    kv, kind = call.kv, plain_kind(call)
    if not isinstance(kv, DenseKV) or call.cu_seqlens is not None:
        return "PyTorch's GPU kernels take plain dense keys and no cu_seqlens here"
    if kind is not None:
        name, reasons = sdpa_gpu.choose(call.q, kv.k, kv.v, kind, needs_grad=call.needs_grad)
        if name is not None:
            return None
        if kind != "end":
            return f"no fused kernel of PyTorch takes it ({reasons})"
    if call.needs_grad:
        return "PyTorch's gradients under a mask are not exact where a row attends to nothing"
    reason = sdpa_gpu.masked_refusal(call.q, kv.k, kv.v)
    return None if reason is None else f"no fused kernel of PyTorch takes a mask here ({reason})"


def kernel_of(call: AttentionCall) -> str | None:
    """Name of the kernel that runs a call on a GPU without a mask in memory, None for others."""
    kind = plain_kind(call)
    if kind is None or call.q.device.type != "cuda":
        return None
    assert isinstance(call.kv, DenseKV)
    needs_grad = call.needs_grad
    return sdpa_gpu.choose(call.q, call.kv.k, call.kv.v, kind, needs_grad=needs_grad)[0]


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by fused PyTorch kernels."""
    if call.cu_seqlens is not None:
        return per_sequence(call, run)
    if call.needs_grad and not is_watched(call.floats):
        call = _of_first_order(call)
    if not call.scale > 0:  # its kernels look for the largest product before they scale
        call = call.with_(q=call.q * (-1 if call.scale < 0 else 0), scale=abs(call.scale) or 1.0)
    result = _without_mask(call) or _by_query_tiles(call)
    return result if call.sink_logits is None else with_sink_logits(result, call.sink_logits)


def forward(call: AttentionCall) -> AttentionOutput:
    """`run` inside the operator, whose results are contiguous."""
    out, lse = run(call)
    return AttentionOutput(out.contiguous(), lse.contiguous())


def _of_first_order(call: AttentionCall) -> AttentionCall:
    """The call whose gradients say that PyTorch's kernels have no second derivative."""
    kv = call.kv
    if isinstance(kv, DenseKV):
        kv = replace(kv, k=first_order(kv.k), v=first_order(kv.v))
    return call.with_(q=first_order(call.q), kv=kv)


def plain_kind(call: AttentionCall) -> sdpa_gpu.Kind | None:
    """The Kind of a call that needs no mask in memory, None for others."""
    kv, q_len, end = call.kv, call.q.shape[2], call.kv.shape[2]
    if not (isinstance(kv, DenseKV) and call.is_plain and call.alibi_slopes is None):
        return None
    if q_len == 0 or end == 0 or not kv.is_plain:
        return None
    first, last = call.q_bounds(0, q_len)
    if call.mask.is_full(first, last, KeyRange(0, end)) and end <= last + 1:
        return "all"
    if not call.mask.causal or (call.mask.window is not None and call.mask.window < end):
        return None
    if first == 0 and q_len == end:
        return "square"
    return "end" if first >= 0 and last + 1 == end else None


def _without_mask(call: AttentionCall) -> AttentionOutput | None:
    """The calls that need no mask in memory; None for all others."""
    kind = plain_kind(call)
    if kind is None:
        return None
    assert isinstance(call.kv, DenseKV)
    q, k, v = call.q, call.kv.k, call.kv.v
    packed = kind == "all" and q.shape[2] == 1
    if packed:  # query heads as rows [B, Hkv, G, D], so that a group reads its KV head once
        q = q.unflatten(1, (-1, call.num_groups)).squeeze(3)
    if q.device.type == "cuda":
        name, _ = sdpa_gpu.choose(q, k, v, kind, needs_grad=call.needs_grad)
        if name is None:
            return None
        result = sdpa_gpu.unmasked(name, q, k, v, causal=kind != "all", scale=call.scale)
    elif kind == "end":
        return None
    else:
        result = _kernel(call, q, k, v, None, causal=kind == "square")
    if not packed:
        return result
    return AttentionOutput(
        result.out.flatten(1, 2)[:, :, None], result.lse.flatten(1, 2)[:, :, None]
    )


def _by_query_tiles(call: AttentionCall) -> AttentionOutput:
    """Tile by tile of queries, each against the keys in its reach."""
    parts = []
    for start in range(0, call.q.shape[2], Q_TILE):
        stop = min(start + Q_TILE, call.q.shape[2])
        tiles = list(visible_tiles(call, start, stop))
        q = call.q[:, :, start:stop]
        parts.append(_one_tile(call, q, start, stop, joined(tiles)) if tiles else _nothing(call, q))
    if not parts:
        return _nothing(call, call.q)
    return AttentionOutput.joined(parts)


def _one_tile(
    call: AttentionCall, q: Tensor, start: int, stop: int, tile: KVTile
) -> AttentionOutput:
    visible = visible_pairs(call, start, stop, tile)
    k, v = seen_kv(call, tile, visible, q.dtype)
    bias = bias_of(call, start, stop, tile)
    scores = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    added = scores.where(visible, -torch.inf)  # [B | 1, Hkv | 1, G | 1, q, t]
    if added.shape[1] > 1 or added.shape[2] > 1:
        added = added.expand(-1, k.shape[1], call.num_groups, -1, -1)
    added = added.flatten(1, 2)
    result = _kernel(call, q, k, v, added, causal=False)
    seen = visible.any(-1).expand(q.shape[0], k.shape[1], call.num_groups, -1).flatten(1, 2)
    return AttentionOutput(
        result.out.masked_fill(~seen[..., None], 0), result.lse.masked_fill(~seen, -torch.inf)
    )


def _nothing(call: AttentionCall, q: Tensor) -> AttentionOutput:
    """Queries that attend to no key at all."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    return AttentionOutput(q.new_zeros(*q.shape[:3], call.kv.shape[4]), lse)


def _kernel(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, *, causal: bool
) -> AttentionOutput:
    """One fused kernel; `added` is the additive mask `[B | 1, H | 1, q, t]`."""
    q, k, v = (sdpa_gpu.in_rows(x) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=added, scale=call.scale
        )
        if planning():
            note_workspace(kernel_bytes(q, k))
        return AttentionOutput(out, lse.float())
    if q.device.type == "cuda":
        return sdpa_gpu.by_groups(q, k, v, added, causal=causal, scale=call.scale)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, is_causal=causal, scale=call.scale, enable_gqa=True
    )
    return AttentionOutput(out, out.new_full(out.shape[:3], torch.nan, dtype=torch.float32))
