"""Received attention: the attention weights of a key, summed over queries (H2O, 2306.14048)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import KeyRange
from saccade.core.kv import KVTile
from saccade.ops import AttentionCall
from saccade.ops.attention.masks import bias_of, seen_kv, visible_pairs

K_TILE = 512
HEAD_TILE = 128
"""Keys whose scores by all queries of a chunk stay in the nearer caches of a CPU."""


class Received(NamedTuple):
    """What the keys of a call received from its queries, float32 `[B, end]` each.

    Attributes:
        mass: attention weight, summed over heads and queries.
        queries: queries for which the key is in reach: by the mask and padding, whether or not a
            block selection read it.
    """

    mass: Tensor
    queries: Tensor


def received_attention(call: AttentionCall, lse: Tensor) -> Received:
    """What each key of a call received; the weights are those the operator itself used.

    Mask, padding, softcap, bias and block selection are those of the call.  The mass of a query
    and head is 1 in all, less the share of a learned sink.

    Args:
        call: one that was run, not packed (`cu_seqlens`).
        lse: `[B, H, t]`, as the operator returned it; with it the weights need no second softmax.

    Memory is O(length): keys are read tile by tile.

    Source: Zhang et al., H2O, 2023 (arXiv 2306.14048), which sums the same weights.
    """
    call = call.transformed()  # the keys of the tiles are as they are stored
    batch, _, end, _, _ = call.kv.shape
    length = call.q.shape[2]
    mass, queries = torch.zeros(2, batch, end, device=call.q.device)
    reach = call.with_(blocks=None)
    for tile in call.kv.tiles(call.mask.key_ranges(*call.q_bounds(0, length), end), K_TILE):
        weights = attention_weights(call, tile, lse).sum((2, 3))  # [B, Hkv, t]
        at = tile.positions.clamp_min(0).expand(weights.shape)
        mass.scatter_add_(1, at.flatten(1), weights.flatten(1))
        seen = visible_pairs(reach, 0, length, tile).any(2).sum(2).float()  # [B | 1, Hkv | 1, t]
        share = seen.expand(weights.shape) / weights.shape[1]
        queries.scatter_add_(1, at.flatten(1), share.flatten(1))
    return Received(mass, queries)


def received_by_heads(
    call: AttentionCall,
    lse: Tensor,
    ranges: Sequence[KeyRange] | None = None,
    *,
    largest: bool = False,
) -> Tensor:
    """What each key received from the queries that share its KV head, float32 `[B, Hkv, end]`.

    The weights are those of `received_attention`: their sum over queries, the mean of the heads of
    a group, or the largest.  Memory is O(length).

    Args:
        call, lse: as for `received_attention`.
        ranges: of positions to score, ascending; others get 0.  None: all that the call reads.
        largest: the largest weight of all queries and heads instead of the sum.
    """
    call = call.transformed()
    batch, kv_heads, end, _, _ = call.kv.shape
    found = torch.zeros(batch, kv_heads, end, device=call.q.device)
    if ranges is None:
        ranges = call.mask.key_ranges(*call.q_bounds(0, call.q.shape[2]), end)
    norm = lse.unflatten(1, (-1, call.num_groups))[..., None]
    for tile in call.kv.tiles(ranges, HEAD_TILE):
        scores, visible = attention_scores(call, tile)
        scores = scores.float().sub_(norm)
        if not visible.all():
            scores = scores.masked_fill(~visible, -torch.inf)
        if largest:
            received = scores.amax((2, 3)).exp_()
        else:
            received = scores.exp_().sum(3).mean(2)
        at = tile.positions.clamp_min(0).expand(received.shape)
        found.scatter_add_(2, at, received)  # each key once; where a head has none: 0
    return found


def attention_weights(call: AttentionCall, tile: KVTile, lse: Tensor) -> Tensor:
    """Weights of all queries of a call on the keys of a tile, `[B, Hkv, G, Lq, t]`, float32.

    Args:
        lse: `[B, H, Lq]` over all keys of the call.
    """
    scores, visible = attention_scores(call, tile)
    norm = lse.unflatten(1, (-1, call.num_groups))[..., None]
    return (scores - norm).exp().where(visible, 0).float()


def attention_scores(call: AttentionCall, tile: KVTile) -> tuple[Tensor, Tensor]:
    """Scores of all queries on the keys of a tile `[B, Hkv, G, Lq, t]`, and which are visible."""
    length = call.q.shape[2]
    q = call.queries(0, length).unflatten(1, (-1, call.num_groups))
    visible = visible_pairs(call, 0, length, tile)
    k, _ = seen_kv(call, tile, visible, q.dtype)
    scores = (q * call.scale) @ k[:, :, None].mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    bias = bias_of(call, 0, length, tile)
    return (scores if bias is None else scores + bias), visible
