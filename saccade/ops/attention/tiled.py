"""Flash attention in plain PyTorch: tiles, an online softmax, O(N) memory.

The algorithm of FlashAttention (arXiv 2205.14135), written to be read.  Every tile of queries loops
over the tiles of keys with a visible key, and keeps three running quantities a row:

    m   the largest score so far
    l   the sum of exp(score - m)
    o   the sum of exp(score - m) * v

When a tile raises the maximum to m', what was summed before shrinks by exp(m - m'):

    o = o * exp(m - m') + exp(S - m') @ V        l = l * exp(m - m') + sum(exp(S - m'))

The output is o / l, divided once, at the end.  Query heads that share a KV head are stacked as
rows of one matrix, so keys and values are read once for all heads of the group, never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.core import AttentionOutput, KeyRange
from saccade.core.kv import KVTile
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.masks import bias_of, seen_kv, visible_pairs
from saccade.ops.attention.varlen import per_sequence
from saccade.ops.attention.watch import is_recorded

Q_TILE = 256
K_TILE = 512


def refusal(call: AttentionCall) -> str | None:
    """Runs everything; under autograd it is correct but keeps its tiles for the backward pass."""
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention tile by tile; equal to the reference to rounding."""
    if call.cu_seqlens is not None:
        return per_sequence(call, run)
    starts = range(0, call.q.shape[2], Q_TILE)
    tiles = [_attend_rows(call, i, min(i + Q_TILE, call.q.shape[2])) for i in starts]
    if not tiles:
        return AttentionOutput(
            call.q.new_zeros(*call.q.shape[:3], call.kv.shape[4], dtype=call.out_dtype),
            call.q[..., 0].float(),
        )
    return AttentionOutput.joined(tiles)


def _attend_rows(call: AttentionCall, start: int, stop: int) -> AttentionOutput:
    """Attention of queries start .. stop-1."""
    q = call.queries(start, stop).unflatten(1, (-1, call.num_groups)) * call.scale
    rows = q.shape[:-1]  # [B, Hkv, G, q]
    m = q.new_full((*rows, 1), -torch.inf)
    l = q.new_zeros((*rows, 1))
    o = q.new_zeros((*rows, call.kv.shape[4]))
    if call.sink_logits is not None:  # the learned sink is a first score without a value
        m = call.sink_logits.to(q.dtype).view(1, *rows[1:3], 1, 1).expand(*rows, 1)
        l = torch.ones_like(l)
    for tile in visible_tiles(call, start, stop):
        m, l, o = _absorb(call, start, stop, tile, q, m, l, o)
    empty = l == 0
    out = o / l.masked_fill(empty, 1)
    lse = (m + l.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
    return AttentionOutput(
        out.flatten(1, 2).to(call.out_dtype), lse.squeeze(-1).flatten(1, 2).float()
    )


def _absorb(
    call: AttentionCall,
    start: int,
    stop: int,
    tile: KVTile,
    q: Tensor,
    m: Tensor,
    l: Tensor,
    o: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the online softmax: take a tile of keys and values into (m, l, o)."""
    visible = visible_pairs(call, start, stop, tile)
    k, v = seen_kv(call, tile, visible, q.dtype)
    scores = q @ k[:, :, None].mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    bias = bias_of(call, start, stop, tile)
    scores = scores if bias is None else scores + bias
    scores = scores.where(visible, -torch.inf)
    m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
    anchor = m_new.masked_fill(m_new == -torch.inf, 0)  # rows without a visible key so far
    shrink = (m - anchor).exp()
    p = (scores - anchor).exp()
    if is_recorded(v) or v.isfinite().all():
        gained = p @ v[:, :, None]
    else:  # an unseen key contributes nothing, not 0 * nan
        products = p[..., None] * v[:, :, None, None]
        gained = products.where(visible[..., None], 0).sum(-2)
    return m_new, l * shrink + p.sum(-1, keepdim=True), o * shrink + gained


def visible_tiles(call: AttentionCall, start: int, stop: int) -> Iterator[KVTile]:
    """Tiles of keys with a key that may be visible to some query in start .. stop-1."""
    ranges = call.mask.key_ranges(*call.q_bounds(start, stop), call.kv.shape[2])
    if call.blocks is not None:
        ranges = _selected(call, start, stop, ranges)
    yield from call.kv.tiles(ranges, K_TILE)


def _selected(
    call: AttentionCall, start: int, stop: int, ranges: tuple[KeyRange, ...]
) -> list[KeyRange]:
    """The parts of the ranges whose key blocks any of the query blocks selects."""
    blocks = call.blocks
    assert blocks is not None
    rows = blocks.allowed[:, :, start // blocks.q_block : (stop - 1) // blocks.q_block + 1]
    wanted = rows.any(2).flatten(0, 1).any(0).tolist()
    parts = []
    for first, last in ranges:
        for block in range(first // blocks.k_block, -(-last // blocks.k_block)):
            if wanted[block]:
                begin, end = block * blocks.k_block, (block + 1) * blocks.k_block
                parts.append(KeyRange(max(first, begin), min(last, end)))
    return parts
