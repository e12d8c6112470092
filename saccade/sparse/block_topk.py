"""Dynamic sparsity: score blocks of keys by pooled queries and keys, read the best ones.

The gate of MoBA (arXiv 2502.13189) and of the coarse stage of SpargeAttention (2502.18137): a
block of keys is represented by its mean, a block of queries by its mean over the tokens and over
the query heads that share a KV head, so that keys are read once for the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView
from saccade.core.kv import dense
from saccade.ops.attention.masks import shared_positions
from saccade.sparse.pattern import last_key_block


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTopK:
    """The `top` best key blocks for each query block and KV head, with sinks and recent blocks.

    Args:
        block: tokens in a block of queries and of keys.
        top: key blocks chosen by score.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        ValueError: block or window_blocks below 1, sink_blocks or top below 0.
    """

    block: int = 64
    top: int = 16
    sink_blocks: int = 1
    window_blocks: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.window_blocks < 1 or self.sink_blocks < 0 or self.top < 0:
            raise ValueError(f"block and window_blocks must be >= 1, the others >= 0, got {self}.")

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern; scores are one small matrix product of the mean vectors of blocks."""
        tile = dense(kv)
        last = last_key_block(q.shape[2], q_offset, self.block, self.block, q.device)[:, None]
        grouped = q.unflatten(1, (kv.shape[1], -1)).mean(2)
        index = torch.arange(q.shape[2], device=q.device)
        q_pooled = _pool(grouped, self.block, index, q.shape[2])
        k_pooled = _pool(tile.k, self.block, shared_positions(tile), kv.shape[2])
        scores = q_pooled @ k_pooled.mT  # [B, Hkv, q_blocks, k_blocks]
        blocks = torch.arange(scores.shape[-1], device=q.device)[None]
        scores = scores.masked_fill(blocks > last, -torch.inf)
        best = scores.topk(min(self.top, scores.shape[-1]), dim=-1).indices
        allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, value=True)
        allowed |= (blocks > last - self.window_blocks - 1) | (blocks < self.sink_blocks)
        allowed &= blocks <= last
        return BlockSelection(allowed=allowed, q_block=self.block, k_block=self.block)


def _pool(x: Tensor, block: int, positions: Tensor, length: int) -> Tensor:
    """Mean over blocks of positions: `[B, H, t, D]` -> `[B, H, blocks, D]` float32."""
    index = positions // block
    blocks = -(-length // block)
    sums = x.new_zeros(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)
    sums.index_add_(2, index, x.float())
    counts = torch.bincount(index, minlength=blocks).clamp_min(1)
    return sums / counts[:, None]
