"""Memory of Triton kernels in the interpreter: every address must lie in a tensor of its launch.

On a GPU a load a little past a tensor usually hits other memory of the process and goes unnoticed,
until a tensor happens to lie at the end of what the process has mapped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

ACCESSES = {  # methods of the interpreter's builder, and which of their arguments is the mask
    "create_masked_load": 1,
    "create_masked_store": 2,
    "create_atomic_rmw": 3,
}


class OutOfBounds(Exception):
    """A kernel read or wrote memory that belongs to none of its tensors."""


def tensors_of(args: object) -> Iterator[Tensor]:
    """All tensors among the arguments of a launch, in tuples too."""
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, dict):
        yield from tensors_of(tuple(args.values()))
    elif isinstance(args, (tuple, list)):
        for arg in args:
            yield from tensors_of(arg)


def extents(args: object) -> np.ndarray:
    """First address and address behind the storage of each tensor, `[n, 2]`."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors_of(args)}
    return np.array(
        [(start, start + storage.nbytes()) for start, storage in storages.items()], dtype=np.uint64
    ).reshape(-1, 2)


@contextmanager
def checked_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, interpreted kernels raise where an address that is not masked belongs to no tensor.

    Yields:
        Names of the kernels that ran, in order.

    Raises:
        Exception: the interpreter's own error, whose text is that of an OutOfBounds.
    """
    from triton.runtime import interpreter

    known: list[Any] = [extents(())]
    ran: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def launched(executor: Any, *args: Any, **options: Any) -> None:
        ran.append(executor.fn.__name__)
        known[0] = extents((args, options))
        launch(executor, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        for name, mask_at in ACCESSES.items():
            original = getattr(interpreter.InterpreterBuilder, name)
            patch.setattr(
                interpreter.InterpreterBuilder, name, _checked(original, mask_at, known, ran)
            )
        yield ran


def _checked(original: Any, mask_at: int, known: list[Any], ran: list[str]) -> Any:
    def access(builder: Any, *args: Any, **options: Any) -> Any:
        pointers = args[1] if original.__name__ == "create_atomic_rmw" else args[0]
        mask = args[mask_at]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data, bool)]
        wrong = _outside(first, np.uint64(size), known[0])
        if wrong.size:
            raise OutOfBounds(_sentence(original.__name__, wrong, known[0], ran[-1]))
        return original(builder, *args, **options)

    return access


def _outside(first: np.ndarray, size: np.uint64, known: np.ndarray) -> np.ndarray:
    """Those addresses whose `size` bytes lie in no storage; most accesses lie in one."""
    if not first.size:
        return first
    starts, stops = known[:, 0], known[:, 1]
    if ((starts <= first.min()) & (first.max() + size <= stops)).any():
        return first[:0]
    inside = np.zeros(first.shape, dtype=bool)
    for start, stop in known:
        inside |= (first >= start) & (first + size <= stop)
    return first[~inside]


def _sentence(access: str, wrong: np.ndarray, known: np.ndarray, kernel: str) -> str:
    """Which kernel, at which line, and how far from the nearest tensor."""
    address = int(wrong[0])
    starts, stops = known[:, 0].astype(object), known[:, 1].astype(object)
    past = min((address - stop for stop in stops if address >= stop), default=None)
    before = min((start - address for start in starts if address < start), default=None)
    return (
        f"{kernel}: {access.removeprefix('create_')} of {len(wrong)} addresses outside of its "
        f"tensors at {_line()}; the first is {past} bytes past the end of one and {before} before "
        "the start of one"
    )


def _line() -> str:
    """The innermost line of a kernel of this project that is running."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/saccade/ops/" in name:
            return f"{name.rpartition('/saccade/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
