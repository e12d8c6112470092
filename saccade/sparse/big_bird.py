"""Static sparsity for prompts: sinks, a window and random blocks.

BigBird (Zaheer et al., arXiv 2007.14062) in its causal form: global tokens at the beginning, a
sliding window, and for each block of queries some blocks drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from saccade.sparse.prompt import PromptCall, PromptPattern
from saccade.sparse.sizes import check_sizes

MIX: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
"""Odd numbers of 32 bits, by which the bits of a pair of blocks are spread (xxHash's primes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BigBird(PromptPattern):
    """Sinks, a local window and `random_blocks` of the others, the same for all heads and texts.

    Which blocks are drawn follows from the positions and the seed, so chunks of a prompt read what
    the whole prompt would.  Nothing is scored.  Decoding reads all keys.

    Args:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.
        random_blocks: how many others each block of queries reads.
        seed: other seeds draw other blocks.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, one of the others below 0.
    """

    block: int = 64
    sink_blocks: int = 2
    window_blocks: int = 3
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, random_blocks=0, seed=0)

    def chosen(self, call: PromptCall) -> Tensor:
        """The others with the smallest numbers of a hash, which differ within a row."""
        rows, columns = (x[None] for x in call.block_numbers(self.block))
        if call.padding is not None:  # a padded row counts from its first real block
            first = call.padding.int().argmax(-1, keepdim=True) // self.block
            rows, columns = rows - first, columns - first
        columns = columns[:, None]
        number = _mixed(_mixed(_mixed(rows + self.seed % 2**31, 0)[..., None] + columns, 1), 2)
        number = number * columns.shape[-1] + columns  # no two of a row are equal
        others = call.seen & ~call.always[:, 0] & (columns >= 0)
        number = number.masked_fill(~others, torch.iinfo(torch.int64).max)
        drawn = number.argsort(-1)[..., : self.random_blocks]
        return torch.zeros_like(others).scatter(-1, drawn, value=True)[:, None]


def _mixed(x: Tensor, turn: int) -> Tensor:
    """Numbers below 2^31 whose bits all depend on all of x, int64."""
    x = (x & 0x7FFFFFFF) * MIX[turn] & 0x7FFFFFFFFFFFFFFF
    return ((x >> 16) ^ (x >> 33)) & 0x7FFFFFFF
