"""Sliding-window attention in fixed memory: sinks that stay, and a ring of recent tokens.

One slot is written per token and nothing is ever moved (a memmove of the window per token, the
textbook way, costs O(window)).  The position p >= sinks lives in slot sinks + (p - sinks) % ring.
The ring holds `window - 1 + chunk` slots: the oldest query of a chunk still needs its window
while the newest is already written.

During steps of decoding only the device knows which slot is next, so there slots are told what
position they hold, and the ring is lent as one page of a ragged view.

What left the window is gone, so a ring alone cannot go back.  A checkpoint keeps the window before
a position, and that is enough to go on from there: prompts that begin alike are read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, dtype_name, expect_tensors
from saccade.cache.step import Cursor, StepWrite
from saccade.core import DenseKV, RaggedKV, Span, Unsupported
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.records import KVSlots, PendingRope

FAR = 2**30  # past every position: how far a ring has come, only the device knows


class RingCache:
    """The last `window` tokens and the first `sinks`, exact under any chunking.

    Args:
        window: keys a token sees, itself counted.
        sinks: first tokens that stay.
        chunk: most tokens appended in place at once; larger chunks are attended to through a
            temporary copy, so they are right too and the memory kept stays the same.
        dtype: storage type; None keeps that of the keys.
        checkpoints: most checkpoints to keep; each takes up to window - 1 slots.
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
        self._oldest = sinks  # first position the ring still holds
        self._most = checkpoints
        self._checkpoints: dict[int, tuple[Tensor, Tensor]] = {}  # by position, ascending
        self._stepped: RaggedKV | None = None  # the ring as steps read it
        self._told = False  # whether its positions are how things are

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def nbytes(self) -> int:
        if self._k is None or self._v is None:
            return 0
        kept = sum(k.nbytes + v.nbytes for k, v in self._checkpoints.values())
        view = self._stepped
        told = () if view is None else (view.positions, view.table, view.kv_lens)
        return self._k.nbytes + self._v.nbytes + kept + sum(x.nbytes for x in told)

    def append(self, k: Tensor, v: Tensor) -> DenseKV:
        """Store a chunk; see LayerCache."""
        self._allocate(k, v)
        count = k.shape[2]
        if count > self._chunk:
            return self._append_large(k, v)
        self._write(k, v, self._seen)
        return self.view()

    def reserve(self, count: int) -> None:
        """See SteppingCache; a step writes one slot."""
        if self._k is None or self._v is None:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        if count != 1:
            raise Unsupported(f"a ring cache takes one token a step, not {count}.")
        if self._stepped is None:
            self._stepped = _one_page_a_head(self._k, self._v)
        if not self._told:
            self._stepped.positions.copy_(self._slot_positions())
            self._told = True

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        assert self._stepped is not None, "claim comes first"
        view = self._stepped
        return view.k.data_ptr(), view.v.data_ptr(), view.positions.data_ptr()

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepWrite:
        """See SteppingCache; the slot follows from the position."""
        assert self._k is not None and self._v is not None and self._stepped is not None
        at = cursor.start
        slot = torch.where(at < self._sinks, at, (at - self._sinks) % self._ring + self._sinks)
        q = append(KVSlots(self._k, self._v, slot), k, v, rope)
        positions = self._stepped.positions
        now = at[:1].to(positions.dtype).expand(len(positions), 1)
        positions.index_copy_(1, slot[:1], now)
        return StepWrite(self._stepped, cursor, q)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self._seen += count
        self._oldest = max(self._oldest, self._seen - self._ring)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        self._told, self._stepped = False, None
        if self._k is not None and self._v is not None:
            self._k, self._v = self._k.index_select(0, rows), self._v.index_select(0, rows)
            for at, parts in self._checkpoints.items():
                k, v = (x.index_select(0, rows) for x in parts)
                self._checkpoints[at] = k, v

    def checkpoint(self) -> None:
        """Keep what it takes to come back to this position; where that is too many, thin out."""
        if not self._most or self._seen in self._checkpoints or self._k is None or self._v is None:
            return
        first = max(self._sinks, self._seen - self._window + 1)
        self._checkpoints[self._seen] = self._copy_of(first, self._seen)
        if len(self._checkpoints) > self._most:
            del self._checkpoints[self._least_useful()]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            Unsupported: the window before `length` is overwritten and no checkpoint is there.
        """
        if length >= self._seen:
            return
        self._told = False
        if self._still_holds(length):
            self._seen = length
        elif length in self._checkpoints:
            k, v = self._checkpoints[length]
            first = length - k.shape[2]
            self._write(k, v, first)
            self._oldest = first
        else:
            raise Unsupported(
                f"the ring cache cannot go back to position {length}: it holds positions "
                f"{self._oldest} to {self._seen - 1} and needs the {self._window} before, and "
                f"its checkpoints are at {list(self._checkpoints) or 'no position'}."
            )
        self._checkpoints = {at: kv for at, kv in self._checkpoints.items() if at <= length}

    def max_rollback(self, length: int) -> int:
        """`length` where its window is still there, else the last checkpoint before it, or 0."""
        length = min(length, self._seen)
        if length == self._seen or self._still_holds(length):
            return length
        return max((at for at in self._checkpoints if at <= length), default=0)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Forget positions start .. stop-1; later keys move down, re-rotated.

        Exact where `window - 1` tokens follow `stop`; with fewer the window has a gap at `start`,
        because what lay before it was overwritten.

        Raises:
            Unsupported: the range begins among the sinks.
        """
        if start < self._sinks:
            raise Unsupported(
                f"a ring cache keeps its {self._sinks} sinks, so it cannot forget from position "
                f"{start} on. Set n_keep to at least the sinks."
            )
        first, moved = max(self._oldest, stop), stop - start
        k, v = self._copy_of(first, self._seen)
        self._oldest = min(self._oldest, start) if self._oldest < stop else self._oldest - moved
        self._checkpoints = {at: kv for at, kv in self._checkpoints.items() if at <= start}
        self._seen = start
        self._write(shift(k, -moved), v, first - moved)

    def reset(self) -> None:
        """Forget everything; memory stays allocated, but for checkpoints."""
        self._told = False
        self._seen, self._oldest = 0, self._sinks
        self._checkpoints.clear()

    def state(self) -> CacheState:
        """See LayerCache; the tensors hold the sinks, then the ring from its oldest token on.

        Checkpoints are not part of it: a restored ring goes on, and begins new ones.
        """
        settings = {
            "window": self._window,
            "sinks": self._sinks,
            "chunk": self._chunk,
            "dtype": dtype_name(self._dtype),
        }
        tensors: dict[str, Tensor] = {}
        if self._k is not None and self._v is not None and self._seen:
            slots = [slice(slot, slot + length) for slot, _, length in self._held()]
            tensors["k"] = torch.cat([self._k[:, :, s] for s in slots], dim=2)
            tensors["v"] = torch.cat([self._v[:, :, s] for s in slots], dim=2)
        return CacheState(settings, {"seen": self._seen, "oldest": self._oldest}, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        seen, oldest = state.progress["seen"], state.progress["oldest"]
        first = max(oldest, self._sinks)
        held = min(seen, self._sinks) + max(0, seen - first)
        expect_tensors(state, {"k": held, "v": held})
        self._k = self._v = self._stepped = None
        self._told = False
        self._seen, self._oldest = seen, oldest
        self._checkpoints.clear()
        if not state.tensors:
            return
        self._allocate(state.tensors["k"].to(device), state.tensors["v"].to(device))
        assert self._k is not None and self._v is not None
        at = 0
        for slot, _, length in self._held():
            self._k[:, :, slot : slot + length] = state.tensors["k"][:, :, at : at + length]
            self._v[:, :, slot : slot + length] = state.tensors["v"][:, :, at : at + length]
            at += length

    def _still_holds(self, length: int) -> bool:
        """Whether the window of the token at position `length` is in the ring."""
        return self._oldest <= max(self._sinks, length - self._window + 1)

    def _least_useful(self) -> int:
        """The checkpoint whose neighbours are nearest to each other; never the newest."""
        at = [0, *self._checkpoints]
        return min(zip(at[2:], at, at[1:], strict=False), key=lambda x: x[0] - x[1])[2]

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        if self._k is not None:
            return
        slots = self._sinks + self._ring
        batch, heads = k.shape[:2]

        def buffer(like: Tensor) -> Tensor:
            dtype = self._dtype or like.dtype
            return torch.empty(batch, heads, slots, like.shape[3], dtype=dtype, device=like.device)

        self._k, self._v = buffer(k), buffer(v)

    def _write(self, k: Tensor, v: Tensor, first: int) -> None:
        """Write tokens at positions first .. into their slots."""
        assert self._k is not None and self._v is not None
        self._told = False
        stop = first + k.shape[2]
        for slot, position, length in self._spans(first, stop):
            at = position - first
            self._k[:, :, slot : slot + length] = k[:, :, at : at + length]
            self._v[:, :, slot : slot + length] = v[:, :, at : at + length]
        self._seen = stop
        self._oldest = max(self._oldest, stop - self._ring)

    def _spans(self, first: int, stop: int) -> list[Span]:
        """Where the positions first .. stop-1 live: sinks, then up to two runs of the ring."""
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

    def _copy_of(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at the positions first .. stop-1, which the ring holds."""
        assert self._k is not None and self._v is not None
        slots = [slice(at, at + length) for at, _, length in self._spans(first, stop)]
        k = torch.cat([self._k[:, :, :0], *(self._k[:, :, s] for s in slots)], dim=2)
        v = torch.cat([self._v[:, :, :0], *(self._v[:, :, s] for s in slots)], dim=2)
        return k, v

    def _slot_positions(self) -> Tensor:
        """int32 `[slots]`, what position each slot holds, -1 for an empty one."""
        found = torch.full((self._sinks + self._ring,), -1, dtype=torch.int32)
        for slot, position, length in self._held():
            found[slot : slot + length] = torch.arange(position, position + length)
        return found

    def _held(self) -> list[Span]:
        """Spans of all positions held, ascending."""
        sinks = self._spans(0, min(self._seen, self._sinks))
        return sinks + self._spans(max(self._oldest, self._sinks), self._seen)

    def view(self) -> DenseKV:
        assert self._k is not None and self._v is not None
        return DenseKV(self._k, self._v, tuple(self._held()))

    def _append_large(self, k: Tensor, v: Tensor) -> DenseKV:
        """A chunk the ring cannot hold beside its window: attend to a copy, keep the end."""
        assert self._k is not None and self._v is not None
        old_k, old_v, spans, at = [], [], [], 0
        for slot, position, length in self._held():
            old_k.append(self._k[:, :, slot : slot + length].clone())
            old_v.append(self._v[:, :, slot : slot + length].clone())
            spans.append(Span(at, position, length))
            at += length
        spans.append(Span(at, self._seen, k.shape[2]))
        view = DenseKV(
            torch.cat([*old_k, k.to(self._k.dtype)], dim=2),
            torch.cat([*old_v, v.to(self._v.dtype)], dim=2),
            tuple(spans),
        )
        self._store_end(k, v)
        return view

    def _store_end(self, k: Tensor, v: Tensor) -> None:
        """Write the sinks and the last tokens of a large chunk; the middle is never needed."""
        first, stop = self._seen, self._seen + k.shape[2]
        if first < self._sinks:
            head = min(self._sinks, stop) - first
            self._write(k[:, :, :head], v[:, :, :head], first)
        tail = max(first, self._sinks, stop - self._ring)
        if tail < stop:
            self._write(k[:, :, tail - first :], v[:, :, tail - first :], tail)


def _one_page_a_head(k: Tensor, v: Tensor) -> RaggedKV:
    """Storage `[B, Hkv, slots, D]` as a ragged view; its positions have yet to be filled."""
    batch, heads, slots, _ = k.shape
    rows = batch * heads
    return RaggedKV(
        k=k.flatten(0, 1),
        v=v.flatten(0, 1),
        positions=torch.empty(rows, slots, dtype=torch.int32, device=k.device),
        table=torch.arange(rows, dtype=torch.int32, device=k.device).view(batch, heads, 1),
        kv_lens=torch.full((batch, heads), slots, dtype=torch.int32, device=k.device),
        end=FAR,
        max_length=slots,
    )
