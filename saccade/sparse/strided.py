"""Static sparsity: the first blocks, a window of recent ones, and every n-th block between.

The fixed pattern of the Sparse Transformer (Child et al., arXiv 1904.10509), in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.ops.selection import BlockRule
from saccade.sparse.pattern import RulePattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided(RulePattern):
    """Sinks, a local window and every `stride`-th block, the same for all heads.

    Args:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, the current one counted.
        stride: outside the window every stride-th block is read; 0 for none.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks or stride below 0.
    """

    block: int = 64
    sink_blocks: int = 1
    window_blocks: int = 8
    stride: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, stride=0)

    @property
    def rule(self) -> BlockRule:
        """See RulePattern; depends on lengths only, not on q and k."""
        return BlockRule(
            summary="none", q_block=self.block, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks, stride=self.stride,
        )  # fmt: skip
