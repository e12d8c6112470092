"""Two buffers on a GPU through which the keys of all layers pass, each a layer ahead of its use.

Layer i is computed with in buffer i % 2.  Copies between host and buffers are queued on a stream of
their own, in the order in which they are asked for:

    computing   ... attention i-1 | attention i    | attention i+1   ...
    copying     ...        keys i | keys i+1       | keys i+2        ...

The keys of layer i+1 are asked for when layer i begins.  All that has read their buffer, attention
of layer i-1, is queued by then, so the copy waits for what is queued (`follow`); layer i+1 waits
for the copy (`wait`).  Nothing else orders the two streams, and nothing waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Final, Protocol
from weakref import ref

import torch
from torch import Tensor

from saccade.cache.dense import grown_capacity
from saccade.cache.host_rows import HostRows

TAIL: Final = 256
"""Newest tokens of a layer that may lie on the device alone.  They are moved to the host together,
so that steps of decoding are the same work until they are."""


class SideStream(Protocol):
    """A queue of copies beside the stream that computes."""

    def follow(self) -> None:
        """Copies from here on begin when all that the computing stream was given has ended."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies (to, source), both contiguous."""
        ...

    def mark(self) -> Any:
        """This point of the queue."""
        ...

    def wait(self, mark: Any) -> None:
        """What the computing stream is given from here on begins when the mark is reached."""
        ...

    def keep(self, buffer: Tensor) -> None:
        """Memory of the device that copies use is not given to others before they have ended."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until all copies have ended."""
        ...


class CudaSide:
    """A CUDA stream; the computing stream is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def follow(self) -> None:
        """See SideStream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """See SideStream."""
        with torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """See SideStream; a new event each time, since captured ones serve their graph alone."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See SideStream."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def keep(self, buffer: Tensor) -> None:
        """See SideStream."""
        buffer.record_stream(self._stream)

    def synchronize(self) -> None:
        """See SideStream."""
        self._stream.synchronize()


def side_stream(device: torch.device) -> SideStream | None:
    """A side stream of a GPU; None for devices that compute with host memory."""
    return CudaSide(device) if device.type == "cuda" else None


class StagedLayer(Protocol):
    """A layer whose keys lie in host memory."""

    @property
    def rows(self) -> HostRows | None:
        """Its memory; None before there is a token."""
        ...

    @property
    def on_host(self) -> int:
        """How many tokens, from the first on, it holds."""
        ...


class StagingBuffers:
    """The two buffers and which layer each holds; shared by the layers of a model.

    Args:
        tail: see TAIL.
        side_of: makes the side stream of a device, or None where nothing is staged; default
            `side_stream`.
    """

    def __init__(
        self,
        *,
        tail: int = TAIL,
        side_of: Callable[[torch.device], SideStream | None] | None = None,
    ) -> None:
        self.tail = tail
        self._side_of, self._sides = side_of or side_stream, dict[torch.device, SideStream | None]()
        self._layers: list[ref[StagedLayer]] = []
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None, None]  # bytes of keys, of values
        self._holds: list[int | None] = [None, None]  # the layer whose tokens on the host it holds
        self._ready: list[Any] = [None, None]  # the newest copy to or from it
        self._side: SideStream | None = None
        self._stepping = False

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(part.nbytes for buffer in self._buffers if buffer for part in buffer)

    def add_layer(self, layer: StagedLayer) -> int:
        """Its place among the layers, which compute in the order in which they were added."""
        self._layers.append(ref(layer))
        return len(self._layers) - 1

    def stages(self, device: torch.device) -> bool:
        """Whether keys for this device are staged: it does not compute with host memory."""
        if device not in self._sides:
            self._sides[device] = self._side_of(device)
        side = self._sides[device]
        self._side = self._side if side is None else side
        return side is not None

    def make_room(self, at: int, rows: HostRows, tokens: int, device: torch.device) -> None:
        """Memory for so many tokens of layer `at` in its buffer; what it held is lost."""
        needed = [tokens * _row_bytes(rows, i) for i in (0, 1)]
        buffer = self._buffers[at % 2]
        if buffer is not None and all(map(_holds_bytes, buffer, needed, (device, device))):
            return
        have = 0 if buffer is None else len(buffer[0]) // max(1, _row_bytes(rows, 0))
        room = grown_capacity(have, tokens, 0)
        old = (0, 0) if buffer is None else tuple(map(len, buffer))
        sizes = [max(n, room * _row_bytes(rows, i)) for i, n in enumerate(old)]
        # Zeros: a kernel may load keys that no query attends to, which must be numbers.
        k, v = (torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes)
        for part in (k, v):
            self._there.keep(part)
        self._buffers[at % 2], self._holds[at % 2], self._ready[at % 2] = (k, v), None, None

    def load(self, at: int) -> None:
        """Queue the copies of layer `at`, unless its buffer holds it, and of the layer behind it.

        Behind the last layer comes the first one of the next pass; not in a step, which may be
        captured and has to end with its own work.
        """
        self._there.follow()
        self._copy_in(at)
        following = at + 1
        if following == len(self._layers):
            following = at if self._stepping else 0
        if following % 2 != at % 2:
            self._copy_in(following)

    def parts(self, at: int, rows: HostRows) -> tuple[Tensor, Tensor]:
        """The buffer of layer `at` as keys `[n, B, Hkv, D]` and values, when its copy has ended."""
        if self._ready[at % 2] is not None:
            self._there.wait(self._ready[at % 2])
        return self.memory(at, rows)

    def memory(self, at: int, rows: HostRows) -> tuple[Tensor, Tensor]:
        """The buffer of layer `at`, whatever is in it."""
        buffer = self._buffers[at % 2]
        assert buffer is not None, "make_room comes first"
        k, v = (_shaped(part, rows, i) for i, part in enumerate(buffer))
        return k, v

    def store(self, at: int, rows: HostRows, first: int, stop: int) -> None:
        """Queue copies of tokens first .. stop-1 of layer `at` from its buffer to the host."""
        self._there.follow()
        self._there.copy(_pairs(rows, self.memory(at, rows), first, stop, to_host=True))
        self._ready[at % 2] = self._there.mark()

    def begin_step(self) -> None:
        """All copies of the step that follows are its own, so that it can be captured."""
        self._forget()
        self._stepping = True

    def begin_layers(self) -> None:
        """Copy every layer anew: a step repeats all that is queued from its first layer on."""
        self._holds, self._ready = [None, None], [None, None]

    def end_step(self) -> None:
        """Copies from here on, and new owners of host memory, come after the step."""
        self._there.follow()
        self._forget()

    def begin_append(self) -> None:
        """Behind a step that came to no end, begin anew."""
        if self._stepping:
            self._forget()

    def _forget(self) -> None:
        """No buffer holds a layer any more; the computing stream waits for all copies."""
        self.begin_layers()
        self._stepping = False
        self._there.wait(self._there.mark())

    def settle(self, at: int) -> None:
        """Wait until host memory is as it was queued; layer `at` is loaded again."""
        if self._side is not None:
            self._side.synchronize()
        if self._holds[at % 2] == at:
            self._holds[at % 2] = None

    @property
    def _there(self) -> SideStream:
        assert self._side is not None, "only staged layers copy"
        return self._side

    def _copy_in(self, at: int) -> None:
        layer = self._layers[at]()
        buffer = self._buffers[at % 2]
        if layer is None or layer.rows is None or buffer is None or self._holds[at % 2] == at:
            return
        rows, count = layer.rows, layer.on_host
        needed = [count * _row_bytes(rows, i) for i in (0, 1)]
        if any(n > len(part) for n, part in zip(needed, buffer, strict=True)):
            return  # a layer with longer rows, which makes room when its turn comes
        if count:
            self._there.copy(_pairs(rows, self.memory(at, rows), 0, count, to_host=False))
        self._holds[at % 2], self._ready[at % 2] = at, self._there.mark()


def _pairs(
    rows: HostRows, buffer: tuple[Tensor, Tensor], first: int, stop: int, *, to_host: bool
) -> list[tuple[Tensor, Tensor]]:
    """(to, source) of copies between a buffer and the host."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for start, *parts in rows.parts(first, stop):
        for host, staged in zip(parts, buffer, strict=True):
            there = staged[start : start + len(host)]
            pairs.append((host, there) if to_host else (there, host))
    return pairs


def _row_bytes(rows: HostRows, which: int) -> int:
    return prod(rows.shapes[which]) * rows.dtype.itemsize


def _shaped(part: Tensor, rows: HostRows, which: int) -> Tensor:
    """Bytes as rows `[n, B, Hkv, D]`."""
    size = max(1, _row_bytes(rows, which))
    count = len(part) // size
    return part[: count * size].view(rows.dtype).view(count, *rows.shapes[which])


def _holds_bytes(part: Tensor, size: int, device: torch.device) -> bool:
    return len(part) >= size and part.device == device
