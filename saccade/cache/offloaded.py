"""Keys and values in host memory, brought to the GPU one layer ahead of the computation.

A GPU holds two buffers for all layers of a model instead of one for each.  While one layer attends
out of its buffer, a stream of its own fills the other one with the history of the next layer, and
takes the new keys of this layer back to pinned host memory.  On a CPU keys are where they belong.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, dtype_name, expect_tensors
from saccade.cache.dense import grown_capacity, placed
from saccade.core import DenseKV


class Staging:
    """The two buffers on the device, and who is in which; shared by the layers of a model."""

    def __init__(self) -> None:
        self._members: list[OffloadedCache] = []
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._holder: list[OffloadedCache | None] = [None, None]
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._last = 1
        self._copies: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(part.nbytes for buffer in self._buffers if buffer for part in buffer)

    def join(self, cache: OffloadedCache) -> None:
        """Layers join in the order in which they are computed."""
        self._members.append(cache)

    def is_first(self, cache: OffloadedCache) -> bool:
        return self._members[0] is cache

    def forget(self, cache: OffloadedCache) -> None:
        """What the device has of this layer is no longer right; wait until nobody copies it."""
        if self._copies is not None:
            self._copies.synchronize()
        self._holder = [None if held is cache else held for held in self._holder]

    def load(self, cache: OffloadedCache, like: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer on the device of `like` with the history of a layer, and room for its chunk."""
        if self._copies is None and like.device.type == "cuda":
            self._copies = torch.cuda.Stream(like.device)
        if cache in self._holder:
            at = self._holder.index(cache)
        else:
            at = 1 - self._last if len(self._members) > 1 else 0
        self._fill(at, cache, like.device)
        self._last = at
        ready = self._ready[at]
        if ready is not None:
            torch.cuda.current_stream(like.device).wait_event(ready)
        buffer = self._buffers[at]
        assert buffer is not None
        return buffer

    def store_and_prefetch(self, cache: OffloadedCache, first: int, stop: int) -> None:
        """Take the new slots of a layer to the host, and begin to fetch the next layer."""
        buffer = self._buffers[self._last]
        assert buffer is not None
        device = buffer[0].device
        if self._copies is not None:  # the new keys are written, the layer before has attended
            self._copies.wait_stream(torch.cuda.current_stream(device))
        with self._copying():
            for host, part in zip(cache.host, buffer, strict=True):
                host[:, :, first:stop].copy_(part[:, :, first:stop], non_blocking=True)
        following = self._members[(self._members.index(cache) + 1) % len(self._members)]
        if following.num_slots and following is not cache:
            self._fill(1 - self._last, following, device)

    def _fill(self, at: int, cache: OffloadedCache, device: torch.device) -> None:
        """Copy the history of a layer into a buffer, unless it is there already."""
        buffer, slots = self._buffers[at], cache.num_slots
        k, v = cache.host
        fits = buffer is not None and all(map(_has_room, buffer, (k, v)))
        if fits and self._holder[at] is cache:
            return
        if self._copies is not None:  # whoever used the buffer last has to be done with it
            self._copies.wait_stream(torch.cuda.current_stream(device))
        if buffer is None or not fits:
            # Not before the work on the old buffer has ended: its memory may be handed out again.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            buffer = (torch.empty_like(k, device=device), torch.empty_like(v, device=device))
            self._buffers[at] = buffer
        with self._copying():
            for part, host in zip(buffer, (k, v), strict=True):
                part[:, :, :slots].copy_(host[:, :, :slots], non_blocking=True)
            if self._copies is not None:
                self._ready[at] = torch.cuda.Event()
                self._copies.record_event(self._ready[at])
        self._holder[at] = cache

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)


class OffloadedCache:
    """Every key and value, in pinned host memory; see LayerCache.

    Args:
        staging: shared with the other layers of the model, made in their order.
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once, when the final length is known.
    """

    def __init__(
        self, staging: Staging, *, dtype: torch.dtype | None = None, reserve: int = 0
    ) -> None:
        self._staging, self._dtype, self._reserve = staging, dtype, reserve
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._slots = 0
        self._device = torch.device("cpu")
        staging.join(self)

    @property
    def seen(self) -> int:
        return self._slots

    @property
    def num_slots(self) -> int:
        """Keys held."""
        return self._slots

    @property
    def host(self) -> tuple[Tensor, Tensor]:
        """Keys and values in host memory `[B, Hkv, capacity, D]`."""
        assert self._k is not None and self._v is not None
        return self._k, self._v

    @property
    def nbytes(self) -> int:
        """Bytes in host memory; the first layer also counts the buffers on the device."""
        own = 0 if self._k is None or self._v is None else self._k.nbytes + self._v.nbytes
        return own + (self._staging.nbytes if self._staging.is_first(self) else 0)

    def append(self, k: Tensor, v: Tensor) -> DenseKV:
        """Store a chunk; see LayerCache.  The view lies on the device of the keys."""
        first, stop = self._slots, self._slots + k.shape[2]
        self._device = k.device
        self._make_room(stop, k, v)
        parts = self._staging.load(self, k) if self._is_elsewhere() else self.host
        for part, new in zip(parts, (k, v), strict=True):
            part[:, :, first:stop] = new
        self._slots = stop
        if self._is_elsewhere():
            self._staging.store_and_prefetch(self, first, stop)
        return DenseKV(parts[0][:, :, :stop], parts[1][:, :, :stop])

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        self._staging.forget(self)
        if self._k is not None and self._v is not None:
            chosen = rows.to(self._k.device)
            self._k = _pinned(self._k.index_select(0, chosen), self._device)
            self._v = _pinned(self._v.index_select(0, chosen), self._device)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on; memory stays allocated."""
        self._slots = min(length, self._slots)

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self._slots)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Forget positions start .. stop-1; later keys move down, re-rotated on the device."""
        self._staging.forget(self)
        k, v = self.host
        later, moved = slice(stop, self._slots), self._slots - stop
        shifted = shift(k[:, :, later].to(self._device), start - stop)
        k[:, :, start : start + moved] = shifted.to(k.device)
        v[:, :, start : start + moved] = v[:, :, later].clone()
        self._slots = start + moved

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._staging.forget(self)
        self._slots = 0

    def state(self) -> CacheState:
        """See LayerCache."""
        tensors: dict[str, Tensor] = {}
        capacity = 0
        self._staging.forget(self)
        if self._k is not None and self._v is not None:
            tensors = {"k": self._k[:, :, : self._slots], "v": self._v[:, :, : self._slots]}
            capacity = self._k.shape[2]
        progress = {"seen": self._slots, "capacity": capacity}
        return CacheState({"dtype": dtype_name(self._dtype)}, progress, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; the tensors stay in host memory."""
        slots = state.progress["seen"]
        expect_tensors(state, {"k": slots, "v": slots})
        self._staging.forget(self)
        self._k, self._v, self._device, self._slots = None, None, device, slots
        if state.tensors:
            room, cpu = max(slots, state.progress["capacity"]), torch.device("cpu")
            self._k = _pinned(placed(state.tensors["k"], room, cpu), device)
            self._v = _pinned(placed(state.tensors["v"], room, cpu), device)

    def _is_elsewhere(self) -> bool:
        """Whether computation happens on another device than the host."""
        return self._device.type != "cpu"

    def _make_room(self, slots: int, k: Tensor, v: Tensor) -> None:
        have = 0 if self._k is None else self._k.shape[2]
        if slots <= have:
            return
        self._staging.forget(self)
        capacity = grown_capacity(have, slots, self._reserve)
        self._k, self._v = self._grown(self._k, k, capacity), self._grown(self._v, v, capacity)

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = like.shape
        on_gpu = like.device.type == "cuda"
        shape, dtype = (batch, heads, capacity, dim), self._dtype or like.dtype
        new = torch.empty(shape, dtype=dtype, pin_memory=on_gpu)
        if old is not None:
            new[:, :, : self._slots] = old[:, :, : self._slots]
        return new


def _has_room(buffer: Tensor, host: Tensor) -> bool:
    """Whether a buffer `[B, H, n, D]` can hold all slots of `host`."""
    same = buffer.shape[:2] == host.shape[:2] and buffer.shape[3] == host.shape[3]
    return same and buffer.shape[2] >= host.shape[2] and buffer.dtype == host.dtype


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x` in memory that a GPU copies from and to without the host."""
    return x.pin_memory() if device.type == "cuda" else x
