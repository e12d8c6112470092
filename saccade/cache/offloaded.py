"""Keys and values in host memory, copied to the GPU one layer ahead of the computation.

A GPU holds two buffers for all layers of a model instead of one a layer (`cache.staging`), and of
each layer the newest tokens, up to `TAIL` of them.  Older tokens lie in page-locked host memory
(`cache.host_rows`), where they do not change: a step of decoding copies them to a buffer and the
newest behind them.  It is the same work for every token until the newest are moved to the host, so
it is captured like that of other caches.  On a CPU all this is a DenseCache.
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
from saccade.cache.dense import DenseCache
from saccade.cache.host_rows import HostRows
from saccade.cache.placing import Placement
from saccade.cache.staging import StagingBuffers
from saccade.cache.step import Cursor, StepView
from saccade.core import DenseKV, Unsupported
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.records import KVSlots, PendingRope


class OffloadedCache(DenseCache):
    """Every key and value, in host memory; see LayerCache.

    Args:
        staging: shared with the other layers of the model, whose caches are made in layer order.
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once, when the final length is known.
    """

    def __init__(
        self, staging: StagingBuffers, *, dtype: torch.dtype | None = None, reserve: int = 0
    ) -> None:
        super().__init__(dtype=dtype, reserve=reserve)
        self._staging, self._at = staging, staging.add_layer(self)
        self._rows: HostRows | None = None  # of a layer that is staged
        self._tail: tuple[Tensor, Tensor] | None = None  # [tail, B, Hkv, D] on the device
        self._on_host = 0  # tokens in _rows; the others are in _tail
        self._origin, self._origin_is = torch.empty(0), -1  # the same on the device, int64 [1]

    @property
    def rows(self) -> HostRows | None:
        """Memory of the host that a GPU copies from; None on a CPU and before the first token."""
        return self._rows

    @property
    def on_host(self) -> int:
        """How many tokens, from the first on, are in `rows`."""
        return self._on_host

    @property
    def nbytes(self) -> int:
        """Bytes in host memory and on the device; the first layer counts the two buffers."""
        tail = 0 if self._tail is None else sum(part.nbytes for part in self._tail)
        own = super().nbytes if self._rows is None else self._rows.nbytes + tail
        return own + (0 if self._at else self._staging.nbytes)

    def append(self, k: Tensor, v: Tensor) -> DenseKV:
        """Store a chunk; see LayerCache.  On a GPU the view lies in a buffer, until another layer
        that shares it is appended to."""
        if not self._is_staged(k):
            self._rows = self._tail = None
            return super().append(k, v)
        rows, tail = self._prepared(k, v)
        first, stop = self._seen, self._seen + k.shape[2]
        spills = stop - self._on_host > self._staging.tail
        self._staging.begin_append()
        if spills:
            rows.grow(max(stop, self._reserve))
        self._make_buffer(stop)
        self._staging.load(self._at)
        buffer = self._staging.parts(self._at, rows)
        for part, newest, new in zip(buffer, tail, (k, v), strict=True):
            part[self._on_host : first] = newest[: first - self._on_host]
            part[first:stop] = new.permute(2, 0, 1, 3)
            if not spills:
                newest[first - self._on_host : stop - self._on_host] = part[first:stop]
        if spills:
            self._staging.store(self._at, rows, self._on_host, stop)
            self._on_host = stop
        self._seen = self._slots = stop
        return _view(buffer, stop)

    def reserve(self, count: int) -> None:
        """See SteppingCache."""
        if self._rows is None:
            return super().reserve(count)
        if count > self._staging.tail:
            raise Unsupported(f"a step appends at most {self._staging.tail} tokens, got {count}.")
        if self._rows.is_pageable:
            raise Unsupported("keys lie in host memory that could not be page-locked.")
        if self._at == 0:
            self._staging.begin_step()
        if self._seen + count - self._on_host > self._staging.tail:
            self._move_to_host(wait=False)
        self._make_buffer(self._on_host)
        if self._origin_is != self._on_host:
            self._origin.fill_(self._on_host)
            self._origin_is = self._on_host
        return None

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        if self._rows is None:
            return super().graph_key()
        assert self._tail is not None
        buffer = self._staging.memory(self._at, self._rows)
        pieces = (piece.k.data_ptr() for piece in self._rows.parts(0, self._on_host))
        return self._on_host, *(part.data_ptr() for part in (*self._tail, *buffer)), *pieces

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """See SteppingCache."""
        if self._rows is None:
            return super().write(k, v, cursor, rope)
        assert self._tail is not None
        if self._at == 0:
            self._staging.begin_layers()
        self._staging.load(self._at)
        newest = [part.permute(1, 2, 0, 3) for part in self._tail]
        q = append(KVSlots(newest[0], newest[1], cursor.start, self._origin), k, v, rope)
        buffer = self._staging.parts(self._at, self._rows)
        stop = self._on_host + self._staging.tail
        for part, tail in zip(buffer, self._tail, strict=True):
            part[self._on_host : stop].copy_(tail)
        return StepView(_view(buffer, stop), cursor, q)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache."""
        return super().place(count, dtype) if self._rows is None else None

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        super().commit(count)
        if self._rows is not None and self._at == 0:
            self._staging.end_step()

    def keep(self, index: Tensor, *, room: int = 0) -> None:
        """See DenseCache; on a CPU alone."""
        if self._rows is not None:
            raise Unsupported(
                "keys in host memory cannot be chosen among by a kv_policy. Leave out offload_kqv."
            )
        super().keep(index, room=room)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._rows is None:
            return super().reorder(rows)
        assert self._tail is not None
        check_rows(rows, self._tail[0].shape[1])
        self._staging.settle(self._at)
        self._rows = self._rows.reordered(rows.cpu(), self._on_host)
        chosen = rows.to(self._tail[0].device)
        k, v = (chosen_rows(part.transpose(0, 1), chosen).transpose(0, 1) for part in self._tail)
        self._tail = k.contiguous(), v.contiguous()
        return None

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on; memory stays allocated."""
        if self._rows is None:
            return super().truncate(length)
        check_length(length)
        self._seen = self._slots = min(length, self._seen)
        self._on_host = min(self._on_host, self._seen)
        return None

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated on the device."""
        if self._rows is None:
            return super().context_shift(start, stop, shift)
        check_shift(start, stop, self._seen)
        assert self._tail is not None
        self._move_to_host(wait=True)
        k, v = self._rows.read(stop, self._seen)
        self._rows.write(start, shift(k.to(self._tail[0].device), start - stop), v)
        self._seen = self._slots = self._on_host = start + k.shape[2]
        return None

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        super().reset()
        self._on_host = 0

    def state(self) -> CacheState:
        """See LayerCache; of keys that a GPU computes with, a copy."""
        if self._rows is None:
            state = super().state()
            progress = {name: state.progress[name] for name in ("seen", "capacity")}
            return state._replace(progress=progress)
        self._move_to_host(wait=True)
        k, v = self._rows.read(0, self._seen)
        progress = {"seen": self._seen, "capacity": self._rows.capacity}
        return CacheState({"dtype": dtype_name(self._dtype)}, progress, {"k": k, "v": v})

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; for a GPU the tensors stay in host memory."""
        seen, self._rows, self._tail = state.progress["seen"], None, None
        self._k = self._v = None
        if not self._staging.stages(device):
            progress = {**state.progress, "slots": seen}
            return super().restore(state._replace(progress=progress), device)
        expect_tensors(state, {"k": seen, "v": seen})
        self._on_host = self._seen = self._slots = 0
        if state.tensors:
            k, v = state.tensors["k"], state.tensors["v"]
            rows, _ = self._prepared(*(x[:, :, :0].to(device) for x in (k, v)))
            self._staging.settle(self._at)
            rows.grow(max(seen, state.progress["capacity"]))
            rows.write(0, k, v)
            self._on_host = self._seen = self._slots = seen
        return None

    def _is_staged(self, k: Tensor) -> bool:
        """Whether new keys are those of a GPU; a cache of another device may be reused if empty."""
        staged = isinstance(k, Tensor) and self._staging.stages(k.device)  # type: ignore[reportUnnecessaryIsInstance]
        if not self._seen:
            return staged
        return self._rows is not None

    def _make_buffer(self, slots: int) -> None:
        """Room in the layer's buffer for so many tokens and the newest behind them."""
        assert self._rows is not None and self._tail is not None
        room = max(slots, self._reserve) + self._staging.tail
        self._staging.make_room(self._at, self._rows, room, self._tail[0].device)

    def _prepared(self, k: Tensor, v: Tensor) -> tuple[HostRows, tuple[Tensor, Tensor]]:
        """Memory for keys and values like these; another batch may follow a reset."""
        like = [
            None if self._tail is None else part.permute(1, 2, 0, 3) for part in self._tail or ()
        ]
        if not self._seen and not all(map(fits, (k, v), like or (None, None))):
            like = []
        check_append(k, v, *(like or (None, None)))
        if self._rows is None or self._tail is None or not like:
            self._k = self._v = None
            dtype = self._dtype or k.dtype
            self._rows = HostRows(k, v, dtype, pinned=k.device.type == "cuda")
            sizes = ((self._staging.tail, *x.shape[:2], x.shape[3]) for x in (k, v))
            new_k, new_v = (torch.zeros(size, dtype=dtype, device=k.device) for size in sizes)
            self._tail = new_k, new_v
            self._origin = torch.zeros(1, dtype=torch.int64, device=k.device)
            self._origin_is = 0
            self._staging.settle(self._at)
        return self._rows, self._tail

    def _move_to_host(self, *, wait: bool) -> None:
        """All tokens on the host; with `wait` the host may read and change them."""
        assert self._rows is not None and self._tail is not None
        if wait:
            self._staging.settle(self._at)
        self._rows.grow(self._seen)
        with (
            torch.inference_mode()
        ):  # sessions are saved outside of the mode that texts are read in
            for start, *parts in self._rows.parts(self._on_host, self._seen):
                at = start - self._on_host
                for host, tail in zip(parts, self._tail, strict=True):
                    host.copy_(tail[at : at + len(host)], non_blocking=not wait)
        self._on_host = self._seen


def _view(buffer: tuple[Tensor, Tensor], stop: int) -> DenseKV:
    k, v = (part[:stop].permute(1, 2, 0, 3) for part in buffer)
    return DenseKV(k, v)
