"""A sliding window in int8, int4 or fp8: a quantized cache that forgets what no query attends to.

The window's history is quantized as in a full cache, in smaller groups, since the unfinished group
weighs more beside a window.  When a group is quantized, those that have left the window are removed
and the others move down: once in a group's tokens, about as many bytes as one query reads.  Sinks
are stored as they are given, in 16 bits; over them and the window attention runs on a dequantized
copy of the window, which is small.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.cache.base import (
    CacheState,
    ShiftKeys,
    check_append,
    check_length,
    check_rows,
    check_shift,
    chosen_rows,
)
from saccade.cache.checkpoints import Checkpoints, check_behind_sinks, missing_window
from saccade.cache.placing import Placement
from saccade.cache.quantized import QuantizedCache
from saccade.cache.recent_tokens import stored_dtype
from saccade.cache.sinks import SinkPlaces
from saccade.cache.sliding import SlidingCache
from saccade.cache.step import Cursor
from saccade.core import DenseKV, KVView, QuantizedKV, Span, Unsupported
from saccade.core.formats import QuantizedTensor
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform

Held = tuple[tuple[Tensor, ...], int, int]
"""Copies of the groups, their tokens, and the position of the first."""


class QuantizedRing(QuantizedCache, SlidingCache):
    """The last `window` tokens in 8 or 4 bits and the first `sinks` as given; see RingCache.

    Args:
        window: keys a token attends to, itself counted.
        sinks: first tokens that stay (StreamingLLM, arXiv 2309.17453).
        checkpoints: most checkpoints to keep; each takes up to a window.
        bits_k, bits_v, group, hadamard, fp8: see QuantizedFormat.
        recent: newest tokens that stay in 16 bits, at least.

    Raises:
        ValueError: a window that is smaller than a group and the newest tokens, sinks or
            checkpoints below 0, or what QuantizedCache refuses.
    """

    def __init__(
        self,
        *,
        window: int,
        sinks: int = 0,
        checkpoints: int = 0,
        bits_k: int = 8,
        bits_v: int = 8,
        group: int = 32,
        recent: int = 8,
        hadamard: bool = True,
        fp8: bool = False,
    ) -> None:
        super().__init__(
            bits_k=bits_k, bits_v=bits_v, group=group, recent=recent, hadamard=hadamard, fp8=fp8
        )
        if window < group + recent or sinks < 0 or checkpoints < 0:
            raise ValueError(
                f"QuantizedRing needs a window of at least group + recent = {group + recent}, "
                f"sinks >= 0 and checkpoints >= 0, got {window}, {sinks} and {checkpoints}. Use a "
                "RingCache for narrow windows."
            )
        self.window, self.sinks = window, sinks
        self._sink_k: Tensor | None = None  # as they were given, and moved
        self._sink_v: Tensor | None = None
        self.places = SinkPlaces(sinks, window)
        self._checkpoints = Checkpoints[tuple[Tensor, ...]](checkpoints)

    @property
    def nbytes(self) -> int:
        """Bytes of the window, the sinks and the checkpoints."""
        sinks = sum(x.nbytes for x in (self._sink_k, self._sink_v) if x is not None)
        return super().nbytes + sinks + self.places.nbytes + self._checkpoints.nbytes

    @property
    def most_checkpoints(self) -> int:
        """How many checkpoints it keeps."""
        return self._checkpoints.most

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store a chunk; see LayerCache."""
        if not self.seen and not self.recent.fits(k, v):
            self._free()
        check_append(k, v, *(self.recent.parts or (None, None)))
        self._allocate_sinks(k, v)
        if self._sink_k is not None:
            self.places.place(self._sink_k, self.seen, k.shape[2])
        taken = self._append_sinks(k, v)
        try:
            return super().append(k[:, :, taken:], v[:, :, taken:])
        except BaseException:
            self._first -= taken
            raise

    def reserve(self, count: int) -> None:
        """See SteppingCache; with sinks the host is needed for every token."""
        if self.sinks:
            raise Unsupported(
                "a quantized ring with sinks cannot be stepped: its window is dequantized for "
                "every token. Use Context.append, or leave n_sinks unset."
            )
        super().reserve(count)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache."""
        if self._first < self.sinks:
            return None
        if self._sink_k is None or self._sink_v is None:
            return super().place(count, dtype)
        self.places.place(self._sink_k, self.seen, count)
        place = super().place(count, dtype)
        return place and place._replace(sinks=(self._sink_k, self._sink_v))

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self.recent.parts:
            check_rows(rows, self.recent.parts[0].shape[0])
        super().reorder(rows)
        if self._sink_k is not None and self._sink_v is not None:
            self._sink_k, self._sink_v = (
                chosen_rows(x, rows) for x in (self._sink_k, self._sink_v)
            )
            self.places.reorder(rows)
        for at, copy in self._checkpoints.kept.items():
            self._checkpoints.kept[at] = tuple(x.index_select(0, rows) for x in copy)

    def checkpoint(self) -> None:
        """Copy the window before this position, so that `truncate` can come back to it."""
        if not self.recent.parts or not self._checkpoints.wants(self.seen):
            return
        skipped = min(self._unseen_at(self.seen), self.groups.length)
        keys, values = self.groups.stored(skipped, self.groups.length)
        parts = (*keys, *values, *self.recent.filled)
        self._checkpoints.add(self.seen, tuple(x.clone() for x in parts))

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Raises:
            Unsupported: the window before `length` is gone and no checkpoint is there.
        """
        check_length(length)
        if length >= self.seen:
            return
        if self._has_window_before(length):
            self._cut(length)
        elif length in self._checkpoints.kept:
            *groups, recent_k, recent_v = self._checkpoints.kept[length]
            self.groups.put_back(tuple(groups), groups[3].shape[2])
            self.recent.replace(recent_k, recent_v)
            self._first = length - self.groups.length - self.recent.length
        else:
            kept = list(self._checkpoints.kept)
            raise Unsupported(missing_window(self._first, self.seen, self.window, length, kept))
        self._checkpoints.forget_after(length)

    def max_rollback(self, length: int) -> int:
        """`length` where its window is still stored, else the last checkpoint before it, or 0."""
        length = min(length, self.seen)
        if length == self.seen or self._has_window_before(length):
            return length
        return self._checkpoints.last(length)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated and quantized again.

        With fewer than `window - 1` tokens behind `stop` the window has a gap, as in a RingCache.

        Raises:
            Unsupported: the range begins among the sinks.
        """
        check_behind_sinks(start, self.sinks)
        check_shift(start, stop, self.seen)
        later = max(self._first, stop)
        k, v = self.given(later, self.seen)
        self._checkpoints.forget_after(start)
        if start > self._first:
            self._cut(start)
        else:
            self.groups.length = self.recent.length = 0
            self._first = later - (stop - start)
        super().append(shift(k, start - stop), v)

    def reset(self) -> None:
        """Remove everything; memory stays allocated, except that of checkpoints."""
        super().reset()
        self._first = 0
        self._checkpoints.kept.clear()
        self.places.reset()

    def state(self) -> CacheState:
        """See LayerCache; sinks are as they were given, and checkpoints no part of it."""
        settings, progress, held = super().state()
        tensors = dict(held)
        settings = {**settings, "window": self.window, "sinks": self.sinks}
        progress = {**progress, "oldest": self._first}
        if tensors and self._sink_k is not None and self._sink_v is not None:
            sunk = slice(0, self._sunk)
            tensors["sinks.k"] = self.places.originals(self._sink_k)[:, :, sunk]
            tensors["sinks.v"] = self._sink_v[:, :, sunk]
        return CacheState(settings, progress, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        super().restore(state, device)
        self._first = state.progress["oldest"]
        self._checkpoints.kept.clear()
        self._sink_k = self._sink_v = None
        if state.tensors and self.sinks:
            k, v = (state.tensors[f"sinks.{x}"].to(device) for x in "kv")
            self._allocate_sinks(k, v)
            self._write_sinks(k, v, 0)

    def _saved_lengths(self, state: CacheState) -> dict[str, int]:
        sunk = min(state.progress["oldest"], self.sinks)
        sinks = dict.fromkeys(("sinks.k", "sinks.v"), sunk) if self.sinks else {}
        return super()._saved_lengths(state) | sinks

    @property
    def _sunk(self) -> int:
        """Sinks that are stored."""
        return min(self._first, self.sinks)

    def _free(self) -> None:
        super()._free()
        self._sink_k = self._sink_v = None

    def _allocate_sinks(self, k: Tensor, v: Tensor) -> None:
        if self._sink_k is not None or not self.sinks:
            return
        shapes = ((*x.shape[:2], self.sinks, x.shape[3]) for x in (k, v))
        new_k, new_v = (k.new_empty(shape, dtype=stored_dtype(k.dtype)) for shape in shapes)
        self.places.allocate(new_k)
        self._sink_k, self._sink_v = new_k, new_v

    def _append_sinks(self, k: Tensor, v: Tensor) -> int:
        """Store those of a chunk's tokens that are sinks; how many they are."""
        taken = max(0, min(self.sinks - self._first, k.shape[2]))
        if taken:
            self._write_sinks(k[:, :, :taken], v[:, :, :taken], self._first)
            self._first += taken
        return taken

    def _write_sinks(self, k: Tensor, v: Tensor, at: int) -> None:
        assert self._sink_k is not None and self._sink_v is not None
        self._sink_k[:, :, at : at + k.shape[2]] = k
        self._sink_v[:, :, at : at + v.shape[2]] = v

    def _has_window_before(self, length: int) -> bool:
        """Whether the window of the token at position `length` is stored."""
        return self._first <= max(self.sinks, length - self.window + 1)

    def _unseen_at(self, position: int) -> int:
        """Tokens of whole groups, from the first on, that no query from `position` on sees."""
        return self.fmt.whole(position - self.window + 1 - self._first)

    def _cut(self, length: int) -> None:
        """Remove all tokens from position `length` on, whose window is stored."""
        if length > self._first:
            super().truncate(length)
        else:
            self.groups.length = self.recent.length = 0
            self._first = length

    def _in_view(self, cursor: Cursor) -> Cursor:
        """Captured steps see a view that begins at the oldest group."""
        assert self._counts is not None
        quantized, newest = self._counts.chunk(2)
        return Cursor(cursor.start - (newest - quantized), cursor.stop - (newest - quantized))

    def _held(self) -> Held:
        return self.groups.copies(), self.groups.length, self._first

    def _put_back(self, held: Held) -> None:
        copies, length, self._first = held
        self.groups.put_back(copies, length)

    def _quantize(self, k: Tensor, v: Tensor, following: int) -> None:
        """Also forgets groups that no query from position `following` on sees."""
        unseen = self._unseen_at(following)
        old = min(unseen, self.groups.length)
        new = min(unseen - old, k.shape[2])
        self.groups.drop(old)
        self._first += old + new
        self.groups.append(k[:, :, new:], v[:, :, new:])

    def _view(self, recent_k: Tensor, recent_v: Tensor) -> KVView:
        view = self._quantized_view(recent_k, recent_v)
        return self._with_sinks(view) if self.sinks else view

    def _lasting_view(self, recent_k: Tensor, recent_v: Tensor) -> KVView:
        """A view over copies of the groups, which move when groups are quantized."""
        view = self._quantized_view(recent_k, recent_v)
        if self.sinks:
            return self._with_sinks(view)
        k, v = (QuantizedTensor(*(x.clone() for x in parts)) for parts in (view.k, view.v))
        return replace(view, k=k, v=v)

    def _with_sinks(self, view: QuantizedKV) -> DenseKV:
        """The sinks and the window, dequantized."""
        assert self._sink_k is not None and self._sink_v is not None
        sinks = [x[:, :, : self._sunk] for x in (self._sink_k, self._sink_v)]
        if view.hadamard:
            sinks = [hadamard_transform(x) for x in sinks]
        tile = dense(view)
        stored = [torch.cat((x, y), 2) for x, y in zip(sinks, (tile.k, tile.v), strict=True)]
        spans = Span(0, 0, self._sunk), Span(self._sunk, self._first, tile.k.shape[2])
        return DenseKV(stored[0], stored[1], spans, hadamard=view.hadamard)
