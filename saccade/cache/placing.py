"""Letting kernels store the next tokens themselves: where these go, and what is read behind them.

`append` takes keys and values as tensors and gives a view.  A step that computes many layers in one
call of C++ has no such tensors: it asks every cache for places first, and counts what was written
when the call has ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache.summaries import SummarizingCache
from saccade.core import KVView, Span


class Placement(NamedTuple):
    """Slots for new tokens.

    Attributes:
        parts: the tensors of `PlacingCache.storage`; others than before where memory has moved.
        slot: of the first new token, the others behind it; in a quantized view among the recent
            tokens.
        position: of the first new token in the positions of the view.
        spans: of all stored tokens, the new ones included; empty where slots are positions.
        sinks: keys and values before those of the view that every new query sees, as they were
            given even where the view is transformed; none, or `[B, Hkv, sinks, D]` each.
        blocks: how many blocks of keys have a summary among `summaries`.
        summaries: all memory of them, `KeySummaries.rows`; None where the cache keeps none.
    """

    parts: tuple[Tensor, ...]
    slot: int
    position: int
    spans: tuple[Span, ...] = ()
    sinks: tuple[Tensor, ...] = ()
    blocks: int = 0
    summaries: Tensor | None = None

    def summarized(self, cache: SummarizingCache) -> Placement:
        """The same with the summaries that a cache keeps of its keys."""
        cache.summarize()
        kept = cache.summaries
        return self if kept is None else self._replace(blocks=kept.count, summaries=kept.rows)


class PlacingCache(ABC):
    """A layer cache that shows where it would store tokens."""

    @abstractmethod
    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """Room for `count` tokens with keys of a dtype; None: they have to be appended.

        `seen` changes with `commit`.  Keys that the new ones push out of a window count as lost
        from here on, so that what was begun may be left unfinished and begun anew.

        Raises:
            ValueError, Unsupported: what `append` would refuse whatever the keys are.
        """

    @abstractmethod
    def storage(self) -> KVView:
        """All storage, filled or not."""

    @abstractmethod
    def commit(self, count: int) -> None:
        """Count `count` tokens that were written to their places."""
