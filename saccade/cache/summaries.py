"""Summaries of blocks of keys, kept beside the keys so that no selection reads these again."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from saccade.ops.selection import SummaryKind, summarize, summary_width


class KeySummaries:
    """One row for each of the first blocks of a cache; see `ops.selection.summarize`.

    Args:
        kind: "mean" or "bounds".
        block: tokens of a block.
        dtype: of the rows; None: float32 for means, the dtype of the keys for bounds.
    """

    def __init__(self, kind: SummaryKind, block: int, dtype: torch.dtype | None = None) -> None:
        self.kind: SummaryKind = kind
        self.block, self._dtype = block, dtype
        self._rows: Tensor | None = None
        self._count = 0

    @property
    def count(self) -> int:
        """Blocks that have a row."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._rows is None else self._rows.nbytes

    @property
    def rows(self) -> Tensor | None:
        """All memory of the rows `[B, Hkv, capacity, width]`; None before there is a block."""
        return self._rows

    def filled(self) -> Tensor | None:
        """The rows `[B, Hkv, count, width]`, without a copy."""
        return None if self._rows is None else self._rows[:, :, : self._count]

    def add(self, k: Tensor, capacity: int) -> None:
        """Summarize keys `[B, Hkv, n, D]` that follow the last block; n is a number of blocks.

        Args:
            capacity: tokens that the cache has memory for.
        """
        new = summarize(k, self.block, self.kind)
        if self._dtype is not None:
            new = new.to(self._dtype)
        stop = self._count + new.shape[2]
        rows = self._with_room(new, max(stop, capacity // self.block))
        rows[:, :, self._count : stop] = new
        self._rows, self._count = rows, stop

    def empty(self) -> KeySummaries:
        """Others of the same kind, without a row."""
        return KeySummaries(self.kind, self.block, self._dtype)

    def cut(self, length: int) -> None:
        """Forget blocks with tokens from position `length` on."""
        self._count = min(self._count, length // self.block)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._rows is not None:
            self._rows = self._rows.index_select(0, rows)

    def _with_room(self, new: Tensor, capacity: int) -> Tensor:
        old = self._rows
        if old is not None and (old.shape[:2], old.shape[3]) == (new.shape[:2], new.shape[3]):
            if old.shape[2] >= capacity and old.dtype == new.dtype and old.device == new.device:
                return old
        else:
            assert not self._count, "another batch begins with an empty cache"
        rows = new.new_empty(*new.shape[:2], capacity, new.shape[3])
        if old is not None and self._count:
            rows[:, :, : self._count] = old[:, :, : self._count]
        return rows


class SummarizingCache(ABC):
    """A layer cache that keeps summaries of its keys where it is told to.

    Attributes:
        summaries: what it keeps; None: nothing.
    """

    summaries: KeySummaries | None = None

    @property
    @abstractmethod
    def seen(self) -> int:
        """See LayerCache."""

    @abstractmethod
    def lasting(self) -> tuple[int, int]:
        """(positions in its view whose keys stay as they are, room for how many)."""

    @abstractmethod
    def keys(self, start: int, stop: int) -> Tensor:
        """The keys `[B, Hkv, n, D]` at positions start .. stop-1 of its view, as given."""

    def summarize(self) -> Tensor | None:
        """Rows `[B, Hkv, n, width]` of all blocks that are full; each block is read once."""
        summaries = self.summaries
        if summaries is None or not self.seen:
            return None
        length, room = self.lasting()
        first, stop = (n * summaries.block for n in (summaries.count, length // summaries.block))
        rows = summaries.rows
        if stop > first or rows is None or rows.shape[2] < room // summaries.block:
            summaries.add(self.keys(first, stop), room)
        return summaries.filled()

    def cut_summaries(self, length: int) -> None:
        """Forget what is known of tokens from position `length` of the view on."""
        if self.summaries is not None:
            self.summaries.cut(length)


def summary_bytes(kind: SummaryKind, block: int, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of the summaries of one head with room for so many tokens.

    Args:
        width: of the keys, D.
        itemsize: bytes of a number of the keys.
    """
    return tokens // block * summary_width(width, kind) * (4 if kind == "mean" else itemsize)
