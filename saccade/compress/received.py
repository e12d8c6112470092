"""Received attention: the attention weights of a key, summed over queries (H2O, 2306.14048)."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import KeyRange, KVView, Mask

K_TILE = 512


def received_attention(q: Tensor, kv: KVView, lse: Tensor, scale: float) -> Tensor:
    """Attention weight of each key, summed over heads and over these queries.

    Args:
        q: the newest queries `[B, H, t, D]`, at the last t positions of the view.
        kv: the view they attended to, causally.
        lse: `[B, H, t]`, as the operator returned it; with it the weights need no second softmax.
        scale: softmax scale.

    Returns:
        float32 `[B, end]`.  Memory is O(length): keys are read tile by tile.

    Source: Zhang et al., H2O, 2023 (arXiv 2306.14048), which sums the same weights.
    """
    batch, kv_heads, end, _, _ = kv.shape
    length = q.shape[2]
    grouped = q.float().unflatten(1, (kv_heads, -1)) * scale
    norm = lse.unflatten(1, (kv_heads, -1))[..., None]
    q_pos = torch.arange(end - length, end, device=q.device)[:, None]
    mass = torch.zeros(batch, end, device=q.device)
    for tile in kv.tiles((KeyRange(0, end),), K_TILE):
        weights = (grouped @ tile.k.float()[:, :, None].mT - norm).exp()
        visible = Mask().allows(q_pos, tile.positions[0, 0][None])
        mass[:, tile.positions[0, 0]] += weights.where(visible, 0).sum((1, 2, 3))
    return mass
