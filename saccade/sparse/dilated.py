"""Static sparsity for prompts: a sliding window with gaps.

The dilated window of Longformer (Beltagy et al., arXiv 2004.05150), in blocks: with dilation d
the window of w blocks reaches d times as far back, and every d-th block of it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.sparse.prompt import PromptCall, PromptPattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dilated(PromptPattern):
    """Sinks, a local window, and every `dilation`-th block before it, `reach` of them.

    The same for all heads and texts, and nothing is scored.  Decoding reads all keys.

    Args:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.
        dilation: distance of the blocks that are read before the window, in blocks.
        reach: how many of them.

    Raises:
        TypeError, ValueError: block, window_blocks or dilation below 1, sink_blocks or reach
            below 0.
    """

    block: int = 64
    sink_blocks: int = 1
    window_blocks: int = 2
    dilation: int = 4
    reach: int = 32

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, dilation=1, sink_blocks=0, reach=0)

    def chosen(self, call: PromptCall) -> Tensor:
        """Blocks at multiples of the dilation, counted from the block of the first query."""
        back = call.distances(self.block)
        is_read = (back % self.dilation == 0) & (back <= self.dilation * self.reach)
        return is_read[None, None]
