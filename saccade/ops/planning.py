"""How much memory tensor code needs at its peak, found by running it on tensors without memory.

Inside `without_memory()` code runs on fake tensors (shapes, strides and lifetimes, no numbers);
`PeakBytes` counts every storage from its birth to its death.  The plan of a computation is then the
computation itself, not a formula that could drift from it.  Kernels that allocate behind PyTorch's
back say so by `takes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.ops.kv_write import hadamard

_planning: list[bool] = []
_counters: list[Counter] = []


class Counter(Protocol):
    """What wants to know of memory that kernels allocate behind PyTorch's back."""

    def note(self, num_bytes: int) -> None:
        """A kernel takes so much while it runs."""
        ...


@contextmanager
def without_memory() -> Generator[None]:
    """Inside, new tensors have no memory and operators compute nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    hadamard.clear_cache()  # a remembered tensor would be real in here, and fake outside
    _planning.append(True)
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    finally:
        _planning.pop()
        hadamard.clear_cache()


def planning() -> bool:
    """Whether this runs without memory, so that a native kernel has nothing to compute on."""
    return bool(_planning)


def counting() -> bool:
    """Whether somebody counts workspaces, in a plan or while kernels really run."""
    return bool(_counters)


def note_workspace(num_bytes: int) -> None:
    """A kernel allocates that much by itself while it runs."""
    for counter in _counters:
        counter.note(num_bytes)


class LargestWorkspace:
    """The largest workspace of a native kernel inside the `with`; threads keep it afterwards."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> LargestWorkspace:
        _counters.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _counters.remove(self)

    def note(self, num_bytes: int) -> None:
        """A kernel takes so much."""
        self.bytes = max(self.bytes, num_bytes)


class PeakBytes(TorchDispatchMode):
    """Counts what is allocated inside the `with`, and nothing from before it.

    Attributes:
        peak: the most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}
        self._now = 0

    def __enter__(self) -> PeakBytes:
        _counters.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _counters.remove(self)
        super().__exit__(*error)

    def note(self, num_bytes: int) -> None:
        """So much more than what is alive now is needed for a moment."""
        self.peak = max(self.peak, self._now + num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func in (aten.is_nonzero.default, aten._local_scalar_dense.default):
            return True  # `if x.isfinite().all()`: planned for numbers, not for NaN
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _key(x) not in given:
                self._count(x)
        self.note(0)
        return result

    def _count(self, x: Tensor) -> None:
        key, storage = _key(x), x.untyped_storage()
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def _key(x: Tensor) -> int:
    """The same for all views of a storage."""
    return x.untyped_storage()._cdata
