"""Attention of the observation window over all keys, as the layer itself computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation
from saccade.compress.received import attention_scores
from saccade.core import DenseKV, Mask
from saccade.core.kv import dense
from saccade.ops import AttentionCall, make_call


def observed_weights(observation: LayerObservation) -> Tensor:
    """Attention weights of the observation window over all keys, `[B, H, w, L]` float32.

    They are those of the layer's own attention: causal, with its softcap, its learned sinks and
    its block selection.
    """
    scores = observed_scores(observation).flatten(1, 2)
    sinks, length = observation.queries.sink_logits, scores.shape[-1]
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    return scores.softmax(-1)[..., :length].nan_to_num()  # of queries that see nothing: 0


def observed_scores(observation: LayerObservation) -> Tensor:
    """Scores of the window on all keys before the softmax, `[B, Hkv, G, w, L]` float32.

    -inf where a query does not see a key.
    """
    call = _call(observation)
    scores, visible = attention_scores(call, dense(call.kv))
    return scores.float().masked_fill(~visible, -torch.inf)


def _call(observation: LayerObservation) -> AttentionCall:
    """The attention of the observed queries over all keys, in columns instead of positions."""
    queries = observation.queries
    return make_call(
        queries.q,
        DenseKV(observation.k, observation.v),
        mask=Mask(),
        q_offset=observation.k.shape[2] - queries.q.shape[2],
        scale=queries.scale,
        softcap=queries.softcap,
        sink_logits=queries.sink_logits,
        attn_mask=_visible(observation),
    )


def _visible(observation: LayerObservation) -> Tensor | None:
    """Keys that exist and whose block a query read, `[B | 1, H, w, L]`; None for all."""
    queries, key_mask = observation.queries, observation.key_mask
    blocks, (_, kv_heads, length) = queries.blocks, observation.k.shape[:3]
    visible = None if key_mask is None else key_mask[:, :, None]
    if blocks is not None:
        at = torch.arange(length, device=blocks.device)[None, None]
        at = at if observation.positions is None else observation.positions.clamp_min(0)
        at = (at // queries.k_block)[:, :, None]  # [B | 1, Hkv | 1, 1, L]
        shape = torch.broadcast_shapes(blocks.shape[:3], at.shape[:3])
        read = blocks.expand(*shape, -1).gather(-1, at.expand(*shape, -1))
        visible = read if visible is None else read & visible
    if visible is None:
        return None
    heads, width = queries.q.shape[1:3]
    visible = visible.expand(-1, kv_heads, width, -1)
    return visible.repeat_interleave(heads // kv_heads, dim=1)
