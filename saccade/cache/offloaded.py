"""Keys and values in host memory, copied to the GPU one layer ahead of the computation.

A GPU holds two staging buffers for all layers of a model instead of one buffer a layer.  While one
layer attends to the keys in its buffer, a second CUDA stream prefetches the keys of the next layer
into the other buffer and copies the new keys of this layer to pinned host memory.  On a CPU the
cache is a plain buffer without staging.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saccade.cache.base import (
    CacheState,
    ShiftKeys,
    check_append,
    check_length,
    check_rows,
    check_shift,
    dtype_name,
    expect_tensors,
)
from saccade.cache.dense import extended, grown_capacity
from saccade.core import DenseKV


class StagingBuffers:
    """The two buffers on the device and which layer each holds; shared by the layers of a model."""

    def __init__(self) -> None:
        self._layers: list[OffloadedCache] = []
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._resident: list[OffloadedCache | None] = [None, None]  # whose keys a buffer holds
        self._loaded: list[torch.cuda.Event | None] = [None, None]
        self._current = 1  # the buffer that was handed out last
        self._copy_stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(part.nbytes for buffer in self._buffers if buffer for part in buffer)

    def add_layer(self, cache: OffloadedCache) -> None:
        """Register a layer; layers are prefetched in the order in which they were added."""
        self._layers.append(cache)

    def is_first(self, cache: OffloadedCache) -> bool:
        """Whether `cache` is the first layer, which counts the bytes of the buffers."""
        return self._layers[0] is cache

    def invalidate(self, cache: OffloadedCache) -> None:
        """Wait for pending copies of a layer; its keys are loaded again at the next use."""
        if self._copy_stream is not None:
            self._copy_stream.synchronize()
        self._resident = [None if layer is cache else layer for layer in self._resident]

    def load(self, cache: OffloadedCache, like: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer on the device of `like` with the keys of a layer and room for a new chunk."""
        if self._copy_stream is None and like.device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(like.device)
        if cache in self._resident:
            index = self._resident.index(cache)
        else:
            index = 1 - self._current if len(self._layers) > 1 else 0
        self._copy_in(index, cache, like.device)
        self._current = index
        loaded = self._loaded[index]
        if loaded is not None:
            torch.cuda.current_stream(like.device).wait_event(loaded)
        buffer = self._buffers[index]
        assert buffer is not None
        return buffer

    def store_and_prefetch(self, cache: OffloadedCache, first: int, stop: int) -> None:
        """Copy slots first .. stop-1 of a layer to the host and prefetch the next layer."""
        buffer = self._buffers[self._current]
        assert buffer is not None
        device = buffer[0].device
        if (
            self._copy_stream is not None
        ):  # after the new keys, and the attention of the layer before
            self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        with self._on_copy_stream():
            for host, part in zip(cache.host, buffer, strict=True):
                host[:, :, first:stop].copy_(part[:, :, first:stop], non_blocking=True)
        following = self._layers[(self._layers.index(cache) + 1) % len(self._layers)]
        if following.num_slots and following is not cache:
            self._copy_in(1 - self._current, following, device)

    def _copy_in(self, index: int, cache: OffloadedCache, device: torch.device) -> None:
        """Copy the keys of a layer into a buffer, unless it holds them already."""
        buffer, slots = self._buffers[index], cache.num_slots
        k, v = cache.host
        fits = buffer is not None and all(map(_has_room, buffer, (k, v)))
        if fits and self._resident[index] is cache:
            return
        if self._copy_stream is not None:  # after the last kernel that reads the buffer
            self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        if buffer is None or not fits:
            # The allocator may hand out the memory of the old buffer again: first end its use.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            buffer = (torch.empty_like(k, device=device), torch.empty_like(v, device=device))
            self._buffers[index] = buffer
        with self._on_copy_stream():
            for part, host in zip(buffer, (k, v), strict=True):
                part[:, :, :slots].copy_(host[:, :, :slots], non_blocking=True)
            if self._copy_stream is not None:
                self._loaded[index] = torch.cuda.Event()
                self._copy_stream.record_event(self._loaded[index])
        self._resident[index] = cache

    def _on_copy_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._copy_stream is None else torch.cuda.stream(self._copy_stream)


class OffloadedCache:
    """Every key and value, in pinned host memory; see LayerCache.

    Args:
        staging: shared with the other layers of the model, whose caches are made in layer order.
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once, when the final length is known.
    """

    def __init__(
        self, staging: StagingBuffers, *, dtype: torch.dtype | None = None, reserve: int = 0
    ) -> None:
        self._staging, self._dtype, self._reserve = staging, dtype, reserve
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._slots = 0
        self._device = torch.device("cpu")
        staging.add_layer(self)

    @property
    def seen(self) -> int:
        """Tokens appended so far."""
        return self._slots

    @property
    def num_slots(self) -> int:
        """Keys stored."""
        return self._slots

    @property
    def free_slots(self) -> int:
        """Tokens that can be appended before memory is allocated."""
        return 0 if self._k is None else self._k.shape[2] - self._slots

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
        check_append(k, v, None, None)
        check_append(k, v, *self._like(k.device))
        first, stop = self._slots, self._slots + k.shape[2]
        self._device = k.device
        self._make_room(stop, k, v)
        parts = self._staging.load(self, k) if self._is_staged() else self.host
        for part, new in zip(parts, (k, v), strict=True):
            part[:, :, first:stop] = new
        self._slots = stop
        if self._is_staged():
            self._staging.store_and_prefetch(self, first, stop)
        return DenseKV(parts[0][:, :, :stop], parts[1][:, :, :stop])

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        self._staging.invalidate(self)
        if self._k is not None and self._v is not None:
            check_rows(rows, self._k.shape[0])
            chosen = rows.to(self._k.device)
            self._k = _pinned(self._k.index_select(0, chosen), self._device)
            self._v = _pinned(self._v.index_select(0, chosen), self._device)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on; memory stays allocated."""
        check_length(length)
        self._slots = min(length, self._slots)

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self._slots)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated on the device."""
        check_shift(start, stop, self._slots)
        self._staging.invalidate(self)
        k, v = self.host
        later, moved = slice(stop, self._slots), self._slots - stop
        shifted = shift(k[:, :, later].to(self._device), start - stop)
        k[:, :, start : start + moved] = shifted.to(k.device)
        v[:, :, start : start + moved] = v[:, :, later].clone()
        self._slots = start + moved

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        self._staging.invalidate(self)
        self._slots = 0

    def state(self) -> CacheState:
        """See LayerCache."""
        tensors: dict[str, Tensor] = {}
        capacity = 0
        self._staging.invalidate(self)
        if self._k is not None and self._v is not None:
            tensors = {"k": self._k[:, :, : self._slots], "v": self._v[:, :, : self._slots]}
            capacity = self._k.shape[2]
        progress = {"seen": self._slots, "capacity": capacity}
        return CacheState({"dtype": dtype_name(self._dtype)}, progress, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; the tensors stay in host memory."""
        slots = state.progress["seen"]
        expect_tensors(state, {"k": slots, "v": slots})
        self._staging.invalidate(self)
        self._k, self._v, self._device, self._slots = None, None, device, slots
        if state.tensors:
            capacity, cpu = max(slots, state.progress["capacity"]), torch.device("cpu")
            k, v = (extended(state.tensors[name], capacity, cpu) for name in "kv")
            self._k, self._v = _pinned(k, device), _pinned(v, device)

    def _like(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Empty tensors of the sizes stored, on the device of new keys; None where nothing is."""
        if self._k is None or self._v is None:
            return None, None
        k, v = (x[:, :, :0].to(device) for x in (self._k, self._v))
        return k, v

    def _is_staged(self) -> bool:
        """Whether keys are computed with on another device than the host."""
        return self._device.type != "cpu"

    def _make_room(self, slots: int, k: Tensor, v: Tensor) -> None:
        have = 0 if self._k is None else self._k.shape[2]
        if slots <= have:
            return
        self._staging.invalidate(self)
        capacity = grown_capacity(have, slots, self._reserve)
        new_k, new_v = self._grown(self._k, k, capacity), self._grown(self._v, v, capacity)
        self._k, self._v = new_k, new_v

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
    """`x` in page-locked memory where `device` is a GPU, so that copies are asynchronous."""
    return x.pin_memory() if device.type == "cuda" else x
