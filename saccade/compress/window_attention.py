"""Attention of the observation window over all keys, as the layer itself computes it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation
from saccade.core import DenseKV, Mask
from saccade.core.kv import dense
from saccade.ops import AttentionCall, attend_received, make_call
from saccade.ops.attention.received import attention_scores


def observed_received(observation: LayerObservation, newest: int | None = None) -> Tensor:
    """Weight that each key has of the queries of the window, `[B, Hkv, L]` float32.

    The mean over queries and the heads of a group.  The weights are those of the layer's own
    attention: causal, with its softcap, its learned sinks and its block selection; a query that
    sees nothing gives nothing.

    Args:
        newest: of so many queries; default all.
    """
    queries = observation.queries
    width = min(newest or queries.q.shape[2], queries.q.shape[2])
    blocks = None if queries.blocks is None else queries.blocks[:, :, -width:]
    window = queries._replace(q=queries.q[:, :, -width:], blocks=blocks)
    return attend_received(_call(replace(observation, queries=window)))[1] / width


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
