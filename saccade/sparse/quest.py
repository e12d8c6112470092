"""Query-aware decoding: read the blocks whose keys may have the highest scores.

Quest (Tang et al., arXiv 2406.10774): the maxima and minima of a block's keys bound the score of
each of them, `sum_d max(q_d max_d, q_d min_d)`.  The query heads that share a KV head share one
selection, by the sum of their bounds, so that keys are read once for the group.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.ops.selection import BlockRule
from saccade.sparse.pattern import RulePattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(RulePattern):
    """The `top` key blocks with the highest bounds for each KV head, with sinks and recent blocks.

    A block of several queries (a prompt) is scored by the sum of its queries' bounds, which is
    loose: the pattern is made for decoding.

    Args:
        block: tokens in a block of keys.
        top: key blocks chosen by bound among those that are not read anyway.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks or top below 0.
    """

    block: int = 32
    top: int = 64
    sink_blocks: int = 1
    window_blocks: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, top=0)

    @property
    def rule(self) -> BlockRule:
        """See RulePattern."""
        return BlockRule(
            summary="bounds", q_block=self.block, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks, top=self.top,
        )  # fmt: skip
