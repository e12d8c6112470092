"""Sliding-window attention in fixed memory: attention sinks and a ring of recent tokens.

One slot is written per token and no key is moved (shifting the window by a memmove per token costs
O(window)).  Position p >= sinks lives in slot sinks + (p - sinks) % ring.  The ring has
`window - 1 + chunk` slots: the oldest query of a chunk still needs its window after the newest key
of the chunk is written.

In a captured decoding step the next slot is computed on the device.  There the positions of the
slots are a device tensor, and the view of the ring is a RaggedKV with one page a head.
"""

from __future__ import annotations

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
    dtype_name,
    expect_tensors,
    fits,
)
from saccade.cache.checkpoints import Checkpoints, check_behind_sinks, missing_window
from saccade.cache.placing import Placement, PlacingCache
from saccade.cache.ring_view import one_page_per_head
from saccade.cache.sinks import SinkPlaces
from saccade.cache.sliding import SlidingCache
from saccade.cache.step import Cursor, StepView
from saccade.core import DenseKV, RaggedKV, Span, Unsupported
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.records import KVSlots, PendingRope


class RingCache(SlidingCache, PlacingCache):
    """The last `window` tokens and the first `sinks`, exact under any chunking.

    Args:
        window: keys a token attends to, itself counted.
        sinks: first tokens that stay (StreamingLLM, arXiv 2309.17453).
        chunk: most tokens appended in place at once.  The queries of larger chunks attend to a
            temporary copy, so results are exact and the ring stays as large as it is.
        dtype: storage type; None keeps that of the keys.
        checkpoints: most checkpoints to keep; each takes up to window - 1 slots.

    Attributes:
        places: where the keys of the sinks stand, as stored until it is told to move them.

    Raises:
        ValueError: window or chunk below 1, sinks or checkpoints below 0.
    """

    def __init__(
        self,
        *,
        window: int,
        sinks: int = 0,
        chunk: int = 1,
        dtype: torch.dtype | None = None,
        checkpoints: int = 0,
    ) -> None:
        if window < 1 or sinks < 0 or chunk < 1 or checkpoints < 0:
            raise ValueError(
                f"RingCache needs window >= 1, sinks >= 0, chunk >= 1 and checkpoints >= 0, "
                f"got {window}, {sinks}, {chunk} and {checkpoints}."
            )
        self._window, self._sinks, self._chunk, self._dtype = window, sinks, chunk, dtype
        self._ring = window - 1 + chunk
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._seen = 0
        self._oldest = sinks  # first position that is still in the ring
        self.places = SinkPlaces(sinks, window)
        self._checkpoints = Checkpoints[tuple[Tensor, Tensor]](checkpoints)
        self._step_view: RaggedKV | None = None
        self._synced = False  # whether the positions of `_step_view` are those of the slots

    @property
    def seen(self) -> int:
        """Tokens appended so far."""
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of the ring, of checkpoints, and of what describes the slots to captured steps."""
        if self._k is None or self._v is None:
            return 0
        view = self._step_view
        indices = () if view is None else (view.positions, view.page_table, view.kv_lens)
        stored = self._k.nbytes + self._v.nbytes + self.places.nbytes
        return stored + self._checkpoints.nbytes + sum(x.nbytes for x in indices)

    @property
    def most_checkpoints(self) -> int:
        """How many checkpoints it keeps."""
        return self._checkpoints.most

    @property
    def checkpoints_are_full(self) -> bool:
        """Whether the next checkpoint replaces one of its own size."""
        sizes = [k.shape[2] for k, _ in self._checkpoints.kept.values()]
        return len(sizes) == self._checkpoints.most and min(sizes, default=0) == self._window - 1

    def append(self, k: Tensor, v: Tensor) -> DenseKV:
        """Store a chunk; see LayerCache."""
        if not self._seen and not (fits(k, self._k) and fits(v, self._v)):
            self._k = self._v = self._step_view = None  # another batch after a reset
        check_append(k, v, self._k, self._v)
        self.places.place(self._allocate(k, v), self._seen, k.shape[2])
        if k.shape[2] > self._chunk:
            return self._append_large(k, v)
        self._write(k, v, self._seen)
        return self.view()

    def view(self) -> DenseKV:
        """Everything stored, without a copy: the sinks and up to two spans of the ring."""
        assert self._k is not None and self._v is not None
        return DenseKV(self._k, self._v, tuple(self._stored_spans()))

    def reserve(self, count: int) -> None:
        """See SteppingCache; a step writes one slot."""
        if self._k is None or self._v is None:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        if count != 1:
            raise Unsupported(f"a ring cache takes one token a step, not {count}.")
        self.places.place(self._k, self._seen, count)
        if self._step_view is None:
            self._step_view = one_page_per_head(self._k, self._v)
        if not self._synced:
            self._step_view.positions.copy_(self._slot_positions())
            self._synced = True

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        assert self._step_view is not None, "reserve comes first"
        view = self._step_view
        read = view.k, view.v, view.positions, view.page_table, view.kv_lens
        return tuple(x.data_ptr() for x in read)

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """See SteppingCache; the slot is computed from the position on the device."""
        assert self._k is not None and self._v is not None and self._step_view is not None
        at = cursor.start
        slot = torch.where(at < self._sinks, at, (at - self._sinks) % self._ring + self._sinks)
        q = append(KVSlots(self._k, self._v, slot), k, v, rope)
        positions = self._step_view.positions
        new = at[:1].to(positions.dtype).expand(len(positions), 1)
        positions.index_copy_(1, slot[:1], new)
        return StepView(self._step_view, cursor, q)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache; slots in a row, as many as are appended in place."""
        spans = self._spans(self._seen, self._seen + count)
        if not self._seen or count > self._chunk or len(spans) != 1:
            return None
        assert self._k is not None and self._v is not None
        self.places.place(self._k, self._seen, count)
        self._synced = False
        self._oldest = max(self._oldest, self._seen + count - self._ring)
        stored = (*self._stored_spans(), *spans)
        return Placement((self._k, self._v), spans[0].slot, self._seen, stored)

    def storage(self) -> DenseKV:
        """See PlacingCache."""
        assert self._k is not None and self._v is not None
        return DenseKV(self._k, self._v)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self._seen += count
        self._oldest = max(self._oldest, self._seen - self._ring)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._k is not None:
            check_rows(rows, self._k.shape[0])
        self._synced, self._step_view = False, None
        if self._k is not None and self._v is not None:
            self._k, self._v = chosen_rows(self._k, rows), chosen_rows(self._v, rows)
            self.places.reorder(rows)
            for at, parts in self._checkpoints.kept.items():
                k, v = (x.index_select(0, rows) for x in parts)
                self._checkpoints.kept[at] = k, v

    def checkpoint(self) -> None:
        """Copy the window before this position, so that `truncate` can come back to it."""
        if self._k is not None and self._checkpoints.wants(self._seen):
            first = max(self._sinks, self._seen - self._window + 1)
            self._checkpoints.add(self._seen, self._copy(self._spans(first, self._seen)))

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Raises:
            Unsupported: the window before `length` is overwritten and no checkpoint is there.
        """
        check_length(length)
        if length >= self._seen:
            return
        self._synced = False
        if self._has_window_before(length):
            self._seen = length
        elif length in self._checkpoints.kept:
            k, v = self._checkpoints.kept[length]
            first = length - k.shape[2]
            self._write(k, v, first)
            self._oldest = first
        else:
            kept = list(self._checkpoints.kept)
            raise Unsupported(missing_window(self._oldest, self._seen, self._window, length, kept))
        self._checkpoints.forget_after(length)

    def max_rollback(self, length: int) -> int:
        """`length` where its window is still stored, else the last checkpoint before it, or 0."""
        length = min(length, self._seen)
        if length == self._seen or self._has_window_before(length):
            return length
        return self._checkpoints.last(length)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated.

        Exact where `window - 1` tokens follow `stop`; with fewer the window has a gap at `start`,
        because the keys before it were overwritten.

        Raises:
            Unsupported: the range begins among the sinks.
        """
        check_behind_sinks(start, self._sinks)
        check_shift(start, stop, self._seen)
        first, moved = max(self._oldest, stop), stop - start
        k, v = self._copy(self._spans(first, self._seen))
        self._oldest = min(self._oldest, start) if self._oldest < stop else self._oldest - moved
        self._checkpoints.forget_after(start)
        self._seen = start
        self._write(shift(k, -moved), v, first - moved)

    def reset(self) -> None:
        """Remove everything; memory stays allocated, except that of checkpoints."""
        self._synced = False
        self._seen, self._oldest = 0, self._sinks
        self._checkpoints.kept.clear()
        self.places.reset()

    def state(self) -> CacheState:
        """See LayerCache; the tensors hold the sinks, then the ring from its oldest token on.

        The sinks are as they were stored: where they stand follows from the next position.

        Checkpoints are not part of it: a restored ring makes new ones.
        """
        settings = {
            "window": self._window,
            "sinks": self._sinks,
            "chunk": self._chunk,
            "dtype": dtype_name(self._dtype),
        }
        tensors: dict[str, Tensor] = {}
        if self._k is not None and self._v is not None and self._seen:
            tensors["k"], tensors["v"] = self._copy(self._stored_spans())
            sinks = min(self._seen, self._sinks)
            tensors["k"][:, :, :sinks] = self.places.originals(self._k)[:, :, :sinks]
        return CacheState(settings, {"seen": self._seen, "oldest": self._oldest}, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        seen, oldest = state.progress["seen"], state.progress["oldest"]
        first = max(oldest, self._sinks)
        stored = min(seen, self._sinks) + max(0, seen - first)
        expect_tensors(state, {"k": stored, "v": stored})
        self._k = self._v = self._step_view = None
        self._synced = False
        self._seen, self._oldest = seen, oldest
        self._checkpoints.kept.clear()
        if not state.tensors:
            return
        self._allocate(state.tensors["k"].to(device), state.tensors["v"].to(device))
        assert self._k is not None and self._v is not None
        saved = state.tensors["k"], state.tensors["v"]
        self._put_back(self._stored_spans(), *saved, seen, oldest)

    def _has_window_before(self, length: int) -> bool:
        """Whether the window of the token at position `length` is in the ring."""
        return self._oldest <= max(self._sinks, length - self._window + 1)

    def _allocate(self, k: Tensor, v: Tensor) -> Tensor:
        """Stored keys, of which none is there yet where the cache is new."""
        if self._k is not None:
            return self._k
        slots = self._sinks + self._ring
        batch, heads = k.shape[:2]

        def buffer(like: Tensor) -> Tensor:
            dtype = self._dtype or like.dtype
            return torch.empty(batch, heads, slots, like.shape[3], dtype=dtype, device=like.device)

        new_k, new_v = buffer(k), buffer(v)
        self._k, self._v = new_k, new_v
        self.places.allocate(new_k)
        return new_k

    def _write(self, k: Tensor, v: Tensor, first: int) -> None:
        """Write tokens at positions first .. into their slots."""
        assert self._k is not None and self._v is not None
        self._synced = False
        stop = first + k.shape[2]
        self._oldest = max(self._oldest, stop - self._ring)  # older keys are overwritten from here
        for slot, position, length in self._spans(first, stop):
            at = position - first
            self._k[:, :, slot : slot + length] = k[:, :, at : at + length]
            self._v[:, :, slot : slot + length] = v[:, :, at : at + length]
        self._seen = stop

    def _spans(self, first: int, stop: int) -> list[Span]:
        """Slots of the positions first .. stop-1: among the sinks, then runs of the ring."""
        spans: list[Span] = []
        sinks = min(stop, self._sinks)
        if first < sinks:
            spans.append(Span(first, first, sinks - first))
        position = max(first, self._sinks)
        while position < stop:
            at = (position - self._sinks) % self._ring
            length = min(stop - position, self._ring - at)
            spans.append(Span(self._sinks + at, position, length))
            position += length
        return spans

    def _stored_spans(self) -> list[Span]:
        """Spans of all positions stored, ascending."""
        sinks = self._spans(0, min(self._seen, self._sinks))
        return sinks + self._spans(max(self._oldest, self._sinks), self._seen)

    def _slot_positions(self) -> Tensor:
        """int32 `[slots]`, the position each slot holds, -1 for an empty one."""
        found = torch.full((self._sinks + self._ring,), -1, dtype=torch.int32)
        for slot, position, length in self._stored_spans():
            found[slot : slot + length] = torch.arange(position, position + length)
        return found

    def _copy(self, spans: list[Span]) -> tuple[Tensor, Tensor]:
        """Keys and values of stored spans, one after the other."""
        assert self._k is not None and self._v is not None
        slots = [slice(slot, slot + length) for slot, _, length in spans]
        k = torch.cat([self._k[:, :, :0], *(self._k[:, :, s] for s in slots)], dim=2)
        v = torch.cat([self._v[:, :, :0], *(self._v[:, :, s] for s in slots)], dim=2)
        return k, v

    def _append_large(self, k: Tensor, v: Tensor) -> DenseKV:
        """Append a chunk larger than `chunk`; the view is a copy of the ring and the chunk."""
        stored, spans, at = self._stored_spans(), list[Span](), 0
        old_k, old_v = self._copy(stored)
        for _, position, length in (*stored, Span(0, self._seen, k.shape[2])):
            spans.append(Span(at, position, length))
            at += length
        both_k = torch.cat((old_k, k.to(old_k.dtype)), dim=2)
        both_v = torch.cat((old_v, v.to(old_v.dtype)), dim=2)
        before = self._seen, self._oldest
        try:
            self._write_sinks_and_newest(k, v)
        except BaseException:  # an interrupt: what was overwritten is in the copies
            self._put_back(stored, old_k, old_v, *before)
            raise
        return DenseKV(both_k, both_v, tuple(spans))

    def _put_back(self, spans: list[Span], k: Tensor, v: Tensor, seen: int, oldest: int) -> None:
        """Write copies of stored spans to their slots again."""
        assert self._k is not None and self._v is not None
        at = 0
        for slot, _, length in spans:
            self._k[:, :, slot : slot + length] = k[:, :, at : at + length]
            self._v[:, :, slot : slot + length] = v[:, :, at : at + length]
            at += length
        self._seen, self._oldest = seen, oldest

    def _write_sinks_and_newest(self, k: Tensor, v: Tensor) -> None:
        """Write the sinks and the last tokens of a large chunk; the others would be overwritten."""
        first, stop = self._seen, self._seen + k.shape[2]
        if first < self._sinks:
            count = min(self._sinks, stop) - first
            self._write(k[:, :, :count], v[:, :, :count], first)
        newest = max(first, self._sinks, stop - self._ring)
        if newest < stop:
            self._write(k[:, :, newest - first :], v[:, :, newest - first :], newest)
