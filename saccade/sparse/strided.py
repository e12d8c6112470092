"""Static sparsity: the first blocks, a window of recent ones, and every n-th block between.

The fixed pattern of the Sparse Transformer (Child et al., arXiv 1904.10509), in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView
from saccade.sparse.pattern import last_key_block


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """Sinks, a local window and every `stride`-th block, the same for all heads.

    Args:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, the current one counted.
        stride: outside the window every stride-th block is read; 0 for none.

    Raises:
        ValueError: block or window_blocks below 1, sink_blocks or stride below 0.
    """

    block: int = 64
    sink_blocks: int = 1
    window_blocks: int = 8
    stride: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.window_blocks < 1 or self.sink_blocks < 0 or self.stride < 0:
            raise ValueError(f"block and window_blocks must be >= 1, the others >= 0, got {self}.")

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern; depends on lengths only, not on q and k."""
        last = last_key_block(q.shape[2], q_offset, self.block, self.block, q.device)[:, None]
        blocks = torch.arange(-(-kv.shape[2] // self.block), device=q.device)[None]
        # Queries of one block may lie in two key blocks: the window counts from the first of them.
        allowed = (blocks > last - self.window_blocks - 1) | (blocks < self.sink_blocks)
        if self.stride:
            allowed |= blocks % self.stride == 0
        allowed &= blocks <= last
        return BlockSelection(allowed=allowed[None, None], q_block=self.block, k_block=self.block)
