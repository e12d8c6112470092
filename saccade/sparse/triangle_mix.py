"""Static sparsity for prompts: sinks and a window, and dense rows where the prompt ends.

TriangleMix (He et al., arXiv 2507.21526): in the deeper layers of a model the middle of the
triangle of attention can be left out, if the last queries of a prompt, from which the answer is
made, read all keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.sparse.prompt import PromptCall, PromptPattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TriangleMix(PromptPattern):
    """Sinks and a local window; all keys for the last queries of a prompt and in the first layers.

    The same for all heads and texts, and nothing is scored.  A Context knows where a prompt ends
    however it is cut into chunks; of a call that nobody announces (`saccade.sparse.followed_by`)
    the last queries are taken for the end.  Decoding reads all keys.

    Args:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.
        dense_rows: queries at the end of the prompt that read all keys, rounded up to blocks.
        dense_layers: first layers of the model that read all keys: an int is a number of layers,
            a float a share of them.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks, dense_rows or a number
            of dense_layers below 0, a share of them outside [0, 1].
    """

    block: int = 64
    sink_blocks: int = 1
    window_blocks: int = 8
    dense_rows: int = 128
    dense_layers: int | float = 0.5

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, dense_rows=0)
        if not isinstance(self.dense_layers, float):
            check_sizes(self, dense_layers=0)
        elif not 0 <= self.dense_layers <= 1:
            raise ValueError(
                f"dense_layers as a float is a share of the layers, in [0, 1], got "
                f"{self.dense_layers!r}. Give an int for a number of layers."
            )

    def first_layer(self, num_layers: int) -> int:
        """See PromptPattern."""
        share = self.dense_layers
        return round(share * num_layers) if isinstance(share, float) else share

    def chosen(self, call: PromptCall) -> Tensor:
        """All blocks for the last rows."""
        return call.last_rows(self.block, self.dense_rows).expand(-1, -1, -1, call.seen.shape[1])
