"""The mask of one tile: Mask, key_padding, kv_lens, blocks and attn_mask in one bool tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.kv import DenseKV, KVTile
from saccade.ops.attention.call import AttentionCall


def visible_pairs(call: AttentionCall, start: int, stop: int, tile: KVTile) -> Tensor:
    """Visibility of queries start .. stop-1 and the keys of a tile.

    Returns:
        bool `[B | 1, Hkv | 1, G | 1, stop - start, t]`, G query heads a KV head.
    """
    q_pos = call.q_positions(start, stop)[..., None]  # [B | 1, 1, q, 1]
    k_pos = tile.positions[..., None, :]  # [B | 1, Hkv | 1, 1, t]
    visible = call.mask.allows(q_pos, k_pos) & real_keys(call, tile)[..., None, :]
    if call.blocks is not None:
        index = torch.arange(start, stop, device=call.q.device)
        visible = visible & call.blocks.visible(index, shared_positions(tile))
    grouped = visible[:, :, None]
    if call.attn_mask is not None:
        attn_mask = call.attn_mask[:, :, start:stop][..., shared_positions(tile)]
        heads = attn_mask.shape[1]
        kv_heads = heads // call.num_groups if heads > 1 else 1
        grouped = grouped & attn_mask.unflatten(1, (kv_heads, -1))
    return grouped


def real_keys(call: AttentionCall, tile: KVTile) -> Tensor:
    """Keys of a tile that exist at all: bool `[B | 1, Hkv | 1, t]`; the rest is never read."""
    real = tile.positions >= 0
    if call.kv_lens is not None:
        real = real & (tile.positions < call.kv_lens[:, None, None])
    if call.key_padding is not None:
        shape = (call.q.shape[0], *tile.positions.shape[1:])
        at = tile.positions.clamp_min(0).expand(shape)
        real = real & call.key_padding[:, None].expand(-1, shape[1], -1).gather(-1, at)
    return real


def shared_positions(tile: KVTile) -> Tensor:
    """Positions `[t]` of a tile whose rows differ at most in which slots are empty."""
    return tile.positions.flatten(0, 1).amax(0).clamp_min(0)


def seen_kv(
    call: AttentionCall, tile: KVTile, visible: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of a tile, 0 where no query attends to them: 0 * NaN would be NaN.

    Args:
        visible: of `visible_pairs`.  Where the Mask alone decides, tiles hold no other key.
    """
    k, v = tile.k.to(dtype), tile.v.to(dtype)
    extras = (call.key_padding, call.kv_lens, call.blocks, call.attn_mask)
    if isinstance(call.kv, DenseKV) and all(x is None for x in extras):
        return k, v
    seen = visible.any(3).any(2)[..., None]  # [B | 1, Hkv | 1, t, 1]
    return k.where(seen, 0), v.where(seen, 0)


def bias_of(call: AttentionCall, start: int, stop: int, tile: KVTile) -> Tensor | None:
    """ALiBi term (arXiv 2108.12409): -slope * |q_pos - k_pos|, `[B | 1, Hkv, G, q, t]`.

    In float64 where the queries are, in float32 otherwise.
    """
    if call.alibi_slopes is None:
        return None
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    slopes = call.alibi_slopes.to(dtype)
    slopes = slopes[None] if slopes.ndim == 1 else slopes  # [B | 1, H]
    slopes = slopes.unflatten(1, (-1, call.num_groups))[..., None, None]
    distance = call.q_positions(start, stop)[..., None] - tile.positions[..., None, :]
    return -slopes * distance.abs().to(dtype)[:, :, None]
