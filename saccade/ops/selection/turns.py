"""Counters in GPU memory by which the programs of one launch find out which of them is the last.

They are zeros before a launch and after it, so none has to be set.  Launches of one stream follow
each other and share counters; a launch that is captured in a CUDA graph, which may be replayed in
any stream beside others, has its own for ever.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

CHUNK = 1 << 17  # counters that are allocated at a time
LEAST = 1 << 15  # where fewer are left, launches that are not captured allocate more

_lock = Lock()


class Turns:
    """The counters of a device; make more of them only where no graph is being captured."""

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._chunks: list[Tensor] = []  # graphs hold addresses, so none is ever freed
        self._by_stream: dict[int, Tensor] = {}

    def of_stream(self, stream: int, count: int, device: torch.device) -> Tensor:
        """Counters of a stream, int32 `[count]`."""
        found = self._by_stream.get(stream)
        if found is None or len(found) < count:
            self._fill(max(LEAST, count), device)
            found = self._by_stream[stream] = self._taken(max(256, count))
        self._fill(LEAST, device)
        return found[:count]

    def of_graph(self, count: int) -> Tensor | None:
        """Counters that nobody else gets, int32 `[count]`; None where too few are left."""
        return None if self._left is None or len(self._left) < count else self._taken(count)

    def _taken(self, count: int) -> Tensor:
        assert self._left is not None
        found, self._left = self._left[:count], self._left[count:]
        return found

    def _fill(self, least: int, device: torch.device) -> None:
        if self._left is not None and len(self._left) >= least:
            return
        self._left = torch.zeros(max(CHUNK, least), dtype=torch.int32, device=device)
        self._chunks.append(self._left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams read zeros


_turns: dict[torch.device, Turns] = {}


def turns_of(device: torch.device, count: int) -> Tensor | None:
    """Zeros for the next launch on the current stream, int32 `[count]`, which leaves them zeros.

    None while a graph is captured and too few are left.
    """
    with _lock:
        turns = _turns.setdefault(device, Turns())
        if device.type != "cuda":
            return turns.of_stream(0, count, device)
        if torch.cuda.is_current_stream_capturing():
            return turns.of_graph(count)
        return turns.of_stream(torch.cuda.current_stream(device).cuda_stream, count, device)
