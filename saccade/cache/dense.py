"""A contiguous cache that grows with the context, and frees memory when keys are removed."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import (
    CacheState,
    ShiftKeys,
    check_append,
    check_length,
    check_not_removed,
    check_rows,
    check_shift,
    chosen_rows,
    dtype_name,
    expect_tensors,
    fits,
)
from saccade.cache.placing import Placement, PlacingCache
from saccade.cache.step import Cursor, StepView
from saccade.cache.summaries import SummarizingCache
from saccade.core import DenseKV, Unsupported
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.records import KVSlots, PendingRope

GROWTH_STEP = 64
GROWTH_SHARE = 16
"""A full buffer grows by a sixteenth, in multiples of 64 slots: few copies, little left unused."""


class DenseCache(PlacingCache, SummarizingCache):
    """Every key and value, in one buffer each.

    Args:
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once, when the final length is known.
    """

    def __init__(self, *, dtype: torch.dtype | None = None, reserve: int = 0) -> None:
        self._dtype = dtype
        self._reserve = reserve
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._slots = 0
        self._seen = 0
        self._compressed_at = 0  # tokens seen when keys were last removed

    @property
    def seen(self) -> int:
        """Tokens appended so far, removed ones included."""
        return self._seen

    @property
    def num_slots(self) -> int:
        """Keys stored; fewer than `seen` after `keep`."""
        return self._slots

    @property
    def like(self) -> tuple[Tensor | None, Tensor | None]:
        """The buffers, for their sizes."""
        return self._k, self._v

    @property
    def free_slots(self) -> int:
        """Tokens that can be appended before memory is allocated."""
        return 0 if self._k is None else self._k.shape[2] - self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers and of summaries, empty slots included."""
        if self._k is None or self._v is None:
            return 0
        summaries = 0 if self.summaries is None else self.summaries.nbytes
        return self._k.nbytes + self._v.nbytes + summaries

    @property
    def is_compressed(self) -> bool:
        """Whether `keep` has removed keys, so that slots no longer are positions."""
        return self._slots != self._seen

    def append(self, k: Tensor, v: Tensor) -> DenseKV:
        """Store a chunk; see LayerCache.  After `keep` the view counts slots, not positions.

        Slots keep the order of positions and every kept key is older than a new query, so causal
        attention over slots is causal attention over positions.
        """
        if not self._seen and not (fits(k, self._k) and fits(v, self._v)):
            self._k = self._v = None  # another batch after a reset
        check_append(k, v, self._k, self._v)
        stop = self._slots + k.shape[2]
        self._make_room(stop, k, v)
        assert self._k is not None and self._v is not None
        self._k[:, :, self._slots : stop] = k
        self._v[:, :, self._slots : stop] = v
        self._slots, self._seen = stop, self._seen + k.shape[2]
        self.summarize()
        return self.view()

    def view(self) -> DenseKV:
        """Everything stored, without a copy."""
        assert self._k is not None and self._v is not None
        return DenseKV(self._k[:, :, : self._slots], self._v[:, :, : self._slots])

    def lasting(self) -> tuple[int, int]:
        """See SummarizingCache."""
        return self._slots, 0 if self._k is None else self._k.shape[2]

    def keys(self, start: int, stop: int) -> Tensor:
        """See SummarizingCache."""
        assert self._k is not None
        return self._k[:, :, start:stop]

    def reserve(self, count: int) -> None:
        """See SteppingCache."""
        if self._k is None or self._v is None:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        self._make_room(self._slots + count, self._k, self._v)
        self.summarize()

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        assert self._k is not None and self._v is not None
        removed = self._seen - self._slots
        rows = None if self.summaries is None else self.summaries.rows
        kept = () if rows is None else (rows.data_ptr(), rows.shape[2])
        return self._k.data_ptr(), self._v.data_ptr(), self._k.shape[2], removed, *kept

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """See SteppingCache."""
        assert self._k is not None and self._v is not None, "reserve comes first"
        cursor = cursor.minus(self._seen - self._slots)
        q = append(KVSlots(self._k, self._v, cursor.start), k, v, rope)
        return StepView(DenseKV(self._k, self._v), cursor, q)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache."""
        if not self._seen:
            return None
        self.reserve(count)
        assert self._k is not None and self._v is not None
        return Placement((self._k, self._v), self._slots, self._slots).summarized(self)

    def storage(self) -> DenseKV:
        """See PlacingCache."""
        assert self._k is not None and self._v is not None
        return DenseKV(self._k, self._v)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self._slots += count
        self._seen += count

    def keep(self, index: Tensor, *, room: int = 0) -> None:
        """Keep only the slots `index` int64 `[B, Hkv, n]` (ascending) and free the rest.

        Args:
            index: slots to keep, a different set for every row and head but equally many.
            room: slots to allocate beyond them for what comes next.
        """
        assert self._k is not None and self._v is not None
        kept = index.shape[2]
        new_k, new_v = (_gather(x, index, kept + room) for x in (self._k, self._v))
        self._k, self._v, self._slots = new_k, new_v, kept
        self._reserve = 0
        self._compressed_at = self._seen
        if self.summaries is not None:
            self.summaries = self.summaries.empty()
            self.summarize()

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._k is not None:
            check_rows(rows, self._k.shape[0])
        if self._k is not None and self._v is not None:
            self._k, self._v = chosen_rows(self._k, rows), chosen_rows(self._v, rows)
        if self.summaries is not None:
            self.summaries.reorder(rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on; memory stays allocated."""
        check_length(length)
        check_not_removed(length, self._compressed_at)
        count = max(0, self._seen - length)
        self._seen, self._slots = self._seen - count, self._slots - count
        self.cut_summaries(self._slots)

    def max_rollback(self, length: int) -> int:
        """Any position from the last `keep` on."""
        return min(length, self._seen) if length >= self._compressed_at else 0

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated in place."""
        check_shift(start, stop, self._seen)
        if self.is_compressed:
            raise Unsupported(
                "a compressed cache cannot be shifted: its positions have gaps. Use a ragged cache "
                "(kv_policy='ada_snapkv'), which stores positions."
            )
        assert self._k is not None and self._v is not None
        moved = self._slots - stop
        shifted = shift(self._k[:, :, stop : self._slots], start - stop)
        self._k[:, :, start : start + moved] = shifted
        self._v[:, :, start : start + moved] = self._v[:, :, stop : self._slots].clone()
        self._slots = self._seen = start + moved
        self.cut_summaries(start)

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        self._slots = self._seen = self._compressed_at = 0
        self.cut_summaries(0)

    def state(self) -> CacheState:
        """See LayerCache."""
        tensors: dict[str, Tensor] = {}
        capacity = 0
        if self._k is not None:
            view = self.view()
            tensors, capacity = {"k": view.k, "v": view.v}, self._k.shape[2]
        progress = {"seen": self._seen, "slots": self._slots, "capacity": capacity}
        return CacheState({"dtype": dtype_name(self._dtype)}, progress, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; as many slots are allocated as were."""
        slots, capacity = state.progress["slots"], state.progress["capacity"]
        expect_tensors(state, {"k": slots, "v": slots})
        self._k = self._v = None
        if state.tensors:
            room = max(slots, capacity)
            self._k = extended(state.tensors["k"], room, device)
            self._v = extended(state.tensors["v"], room, device)
        self._seen, self._slots = state.progress["seen"], slots
        self._compressed_at = self._seen if self.is_compressed else 0
        self.cut_summaries(0)
        self.summarize()

    def _make_room(self, slots: int, k: Tensor, v: Tensor) -> None:
        have = 0 if self._k is None else self._k.shape[2]
        if slots <= have:
            return
        capacity = grown_capacity(have, slots, self._reserve)
        new_k = _grown(self._k, k, capacity, self._slots, self._dtype)
        new_v = _grown(self._v, v, capacity, self._slots, self._dtype)
        self._k, self._v = new_k, new_v


def grown_capacity(have: int, wanted: int, reserve: int) -> int:
    """Slots to allocate where `wanted` exceed `have`: `reserve` if enough, else more."""
    wanted_or_more = max(wanted, have + have // GROWTH_SHARE)
    grown = -(-wanted_or_more // GROWTH_STEP) * GROWTH_STEP
    return reserve if wanted <= reserve else grown


def _grown(
    old: Tensor | None, like: Tensor, capacity: int, used: int, dtype: torch.dtype | None
) -> Tensor:
    if old is not None:
        return extended(old[:, :, :used], capacity)
    batch, heads, _, dim = like.shape
    return like.new_empty(batch, heads, capacity, dim, dtype=dtype or like.dtype)


def extended(x: Tensor, capacity: int, device: torch.device | None = None) -> Tensor:
    """A copy of `x` `[B, H, n, D]` with room for `capacity` slots, on its own device by default."""
    batch, heads, used, dim = x.shape
    new = x.new_empty(batch, heads, capacity, dim, device=device)
    new[:, :, :used] = x
    return new


def _gather(x: Tensor, index: Tensor, capacity: int) -> Tensor:
    """A new buffer of `capacity` slots that begins with the slots `index` of `x`."""
    slots = index[..., None].expand(-1, -1, -1, x.shape[3])
    return extended(x.gather(2, slots), capacity)
