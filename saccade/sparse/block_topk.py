"""Dynamic sparsity: score blocks of keys by pooled queries and keys, read the best ones.

The gate of MoBA (arXiv 2502.13189) and of the coarse stage of SpargeAttention (2502.18137): a
block of keys is represented by its mean, a block of queries by its mean over the tokens and over
the query heads that share a KV head, so that keys are read once for the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.ops.selection import BlockRule
from saccade.sparse.pattern import RulePattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTopK(RulePattern):
    """The `top` best key blocks for each query block and KV head, with sinks and recent blocks.

    Args:
        block: tokens in a block of queries and of keys.
        top: key blocks chosen by score among those that are not read anyway.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks or top below 0.
    """

    block: int = 64
    top: int = 16
    sink_blocks: int = 1
    window_blocks: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, top=0)

    @property
    def rule(self) -> BlockRule:
        """See RulePattern; scores are one small matrix product of the mean vectors of blocks."""
        return BlockRule(
            summary="mean", q_block=self.block, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks, top=self.top,
        )  # fmt: skip
