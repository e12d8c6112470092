"""Received attention: the attention weights of a key, summed over queries (H2O, 2306.14048)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops import AttentionCall
from saccade.ops.attention.masks import visible_pairs

K_TILE = 512


class Received(NamedTuple):
    """What the keys of a call received from its queries, float32 `[B, end]` each.

    Attributes:
        mass: attention weight, summed over heads and queries.
        queries: queries for which the key is in reach: by the mask and padding, whether or not a
            block selection read it.
    """

    mass: Tensor
    queries: Tensor


def received_attention(call: AttentionCall, received: Tensor) -> Received:
    """What each key of a call received from all heads, and from how many queries it could.

    The mass of a query and head is 1 in all, less the share of a learned sink.

    Args:
        call: one that was run, not packed (`cu_seqlens`).
        received: `[B, Hkv, end]`, the sums of `ops.attend_received`.

    Source: Zhang et al., H2O, 2023 (arXiv 2306.14048), which sums the same weights.
    """
    batch, kv_heads, end, _, _ = call.kv.shape
    length = call.q.shape[2]
    mass = received.sum(1) * call.num_groups
    queries = torch.zeros(batch, end, device=call.q.device)
    reach = call.with_(blocks=None)
    for tile in call.kv.tiles(call.mask.key_ranges(*call.q_bounds(0, length), end), K_TILE):
        seen = visible_pairs(reach, 0, length, tile).any(2).sum(2).float()  # [B | 1, Hkv | 1, t]
        share = seen.expand(batch, kv_heads, -1) / kv_heads
        at = tile.positions.clamp_min(0).expand(share.shape)
        queries.scatter_add_(1, at.flatten(1), share.flatten(1))
    return Received(mass, queries)
