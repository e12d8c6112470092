"""Dynamic sparsity by share: as many blocks as the attention is spread over.

The threshold of Twilight (arXiv 2502.02770) on the scores of `BlockTopK`: where attention is
concentrated few blocks hold most of it, and where it is flat many are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.ops.selection import BlockRule
from saccade.sparse.pattern import RulePattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTopP(RulePattern):
    """The fewest key blocks that hold a share of the attention, as the means of blocks estimate it.

    Args:
        block: tokens in a block of queries and of keys.
        p: share of the estimated attention to the blocks that are not read anyway, in (0, 1];
            averaged over the query heads that share a KV head.  1 reads all blocks.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks below 0, p out of range.
    """

    block: int = 64
    p: float = 0.9
    sink_blocks: int = 1
    window_blocks: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0)
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 < self.p <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"p is a share of the attention, in (0, 1], got {self.p!r}.")

    @property
    def rule(self) -> BlockRule:
        """See RulePattern."""
        return BlockRule(
            summary="mean", q_block=self.block, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks, share=float(self.p),
        )  # fmt: skip
