"""Kernel launches that were worked out once and are repeated for other tensors.

A short kernel takes the GPU some microseconds.  Choosing its tiles, describing its tensors and
binding some thirty arguments by Triton take the host a hundred and more, in every call.  All of it
follows from shapes, strides, dtypes and options.  So the first call with given ones is recorded:
which tensors it allocates, and which compiled kernels it launches with which arguments.  Later
calls allocate the same and launch the same kernels, with other pointers.

Only work that consists of allocations, views and kernels that go through `launch_kernel` is
repeated; any other operator of PyTorch that is seen while recording makes the work unrepeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from copy import copy
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.core.held_values import holding
from saccade.ops.gpu.launching import on

_recorder: ContextVar[Recorder | None] = ContextVar("saccade_recorder", default=None)

ALIGNED = 512  # bytes: where PyTorch's allocator begins tensors on a GPU
_ALLOCATIONS = frozenset({
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
})  # fmt: skip


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, noted where a call is recorded.

    Every kernel that may run while a call is recorded has to be launched by this function.
    """
    compiled = kernel[grid](*args, **options)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launched(kernel, compiled, grid, args, options)


class Pointer(NamedTuple):
    """Stands for a tensor among recorded arguments: a number of a tensor, and bytes behind it."""

    tensor: int
    offset: int


STREAM = Pointer(-1, 0)
"""Stands for the stream of a launch, which is numbered behind all tensors."""


class Nested(NamedTuple):
    """A tuple of arguments with a Pointer in it."""

    parts: tuple[Any, ...]


class Allocation(NamedTuple):
    """An uninitialized tensor that is returned."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Change(NamedTuple):
    """An argument that is another one in each call: a pointer, alone or in front of `rest`.

    Attributes:
        nested: where it is anything else.
    """

    at: int
    tensor: int
    offset: int
    rest: tuple[Any, ...] | None
    nested: Nested | None


class Launch(NamedTuple):
    """One launch: `run(*args)`, changed as `changes` say."""

    run: Callable[..., None]
    args: tuple[Any, ...]
    changes: tuple[Change, ...]


# kernel, compiled kernel, grid, arguments, options
_Launched: TypeAlias = tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class Unrepeatable(Exception):
    """Recorded work that cannot be repeated for other tensors."""


class Replay:
    """Recorded work.

    Args:
        launches: in their order.  Tensors are numbered: given ones, results, temporary ones.
        results: what is returned.
        temporary: bytes from the beginning of a buffer to each temporary tensor, and its size.
        device: a CUDA device with an index.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        results: Sequence[Allocation],
        temporary: tuple[Sequence[int], int],
        device: torch.device,
    ) -> None:
        self._launches, self._results = tuple(launches), tuple(results)
        (self._starts, self._temporary_bytes), self._device = temporary, device

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results for tensors of the same description as those of the recording, in order."""
        device = self._device
        with on(device):
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device)
                for shape, stride, dtype in self._results
            ]
            pointers = [x.data_ptr() for x in tensors]
            pointers += [x.data_ptr() for x in made]
            buffer = None  # lives until the kernels that use it are in the stream
            if self._temporary_bytes:
                buffer = torch.empty(self._temporary_bytes, dtype=torch.uint8, device=device)
                first = buffer.data_ptr()
                pointers += [first + start for start in self._starts]
            pointers.append(torch._C._cuda_getCurrentRawStream(device.index))
            for run, given, changes in self._launches:
                args = list(given)
                for at, tensor, offset, rest, nested in changes:
                    pointer = pointers[tensor] + offset
                    if nested is not None:
                        args[at] = _filled(nested, pointers)
                    else:
                        args[at] = pointer if rest is None else (pointer, *rest)
                run(*args)
        return tuple(made)


def _filled(part: Any, pointers: Sequence[int]) -> Any:
    kind = type(part)
    if kind is Pointer:
        return pointers[part.tensor] + part.offset
    if kind is Nested:
        return tuple([_filled(x, pointers) for x in part.parts])
    return part


def record(
    work: Callable[[], tuple[Tensor, ...]], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Replay | None]:
    """What `work` returns, and how to repeat it for other tensors, None where it cannot be.

    Args:
        tensors: all that the work reads or writes and has not allocated itself, on one device.
    """
    recorder = Recorder()
    with recorder:
        results = holding(_recorder, recorder, work)
    try:
        return results, recorder.replay(tensors, results)
    except Unrepeatable:
        return results, None


def is_hooked() -> bool:
    """Whether a profiler of Triton wants to see each launch, which a replay does not show it."""
    runtime = _runtime()
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


@cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


class Recorder(TorchDispatchMode):
    """Notes allocations and launches while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []
        self._launched: list[_Launched] = []
        self._is_plain = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator as without the mode."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._made.append(result)
        elif not func.is_view:
            self._is_plain = False
        return result

    def launched(self, *launch: Any) -> None:
        """Note a launch: kernel, compiled kernel, grid, arguments, options."""
        self._launched.append(cast(Any, launch))

    def replay(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Replay:
        """The work of all launches.

        Raises:
            Unrepeatable: other operators ran, or arguments whose origin is not clear.
        """
        device = tensors[0].device
        if not self._is_plain or any(x.device != device for x in (*tensors, *self._made)):
            raise Unrepeatable
        returned, temporary = _returned(list(results), self._made)
        known = [*tensors, *(self._made[i] for i in returned), *temporary]
        sizes = [x.untyped_storage().nbytes() for x in temporary]
        places, launches = _Places(known), list[Launch]()
        for each in self._launched:
            scratch = Pointer(len(tensors) + len(returned) + len(sizes), 0)
            launch, more = _launch_of(each, places, scratch)
            launches.append(launch)
            sizes += more
        ends = list(accumulate(-(-size // ALIGNED) for size in sizes))
        starts = [ALIGNED * end for end in [0, *ends][: len(sizes)]]
        size = ALIGNED * ends[-1] if ends else 0
        allocations = [Allocation(tuple(x.shape), x.stride(), x.dtype) for x in results]
        return Replay(launches, allocations, (starts, size), device)


def _returned(results: Sequence[Tensor], made: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Which allocation each result is as a whole, and all other allocations.

    Raises:
        Unrepeatable: a result that is no allocation, or a part of one.
    """
    starts = [x.data_ptr() for x in made]
    found: list[int] = []
    for x in results:
        if x.data_ptr() not in starts or x.numel() == 0:
            raise Unrepeatable
        at = starts.index(x.data_ptr())
        is_whole = x.nbytes == made[at].nbytes and x.dtype == made[at].dtype
        if at in found or not is_whole:
            raise Unrepeatable
        found.append(at)
    return found, [x for i, x in enumerate(made) if i not in found]


class _Places:
    """Which tensor a pointer belongs to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._all = tensors
        starts = [x.data_ptr() for x in tensors]
        if len(set(starts)) != len(starts) or 0 in starts:
            raise Unrepeatable  # the same memory twice, which need not be so for other tensors
        self._starts = {start: index for index, start in enumerate(starts)}

    def pointer(self, x: Tensor) -> Pointer:
        """The tensor that `x` is, or the only one whose memory it lies in."""
        found = self._starts.get(x.data_ptr())
        if found is not None:
            return Pointer(found, 0)
        memory = x.untyped_storage().data_ptr()
        within = [i for i, y in enumerate(self._all) if y.untyped_storage().data_ptr() == memory]
        if len(within) != 1:
            raise Unrepeatable
        return Pointer(within[0], x.data_ptr() - self._all[within[0]].data_ptr())


def _launch_of(launched: _Launched, places: _Places, scratch: Pointer) -> tuple[Launch, list[int]]:
    """A launch, and the bytes at `scratch` that it needs beside its tensors, if it does.

    Triton's launcher asks in every call for memory where a kernel makes TMA descriptors.  Here it
    is called once, with marks for what changes, to see what it hands to the function below it.
    """
    kernel, compiled, grid, args, options = launched
    launcher: Any = getattr(compiled, "run", None)
    if getattr(launcher, "profile_scratch_size", 1) > 0:  # the interpreter's, or a profiler's
        raise Unrepeatable
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: value for name, value in options.items() if name in kernel.arg_names}
    values = [given.get(each.name, each.default) for each in kernel.params]
    seen: list[tuple[Any, ...]] = []
    sizes: list[int] = []

    def memory(size: int, alignment: int, stream: object) -> Pointer:
        sizes.append(size)
        return scratch

    watched = copy(launcher)
    watched.launch = lambda *handed: seen.append(handed)
    grid = (*grid, *(1,) * (3 - len(grid)))
    hooks = (None, None, None)  # `is_hooked` has said that nobody listens
    handed = (*grid, STREAM, compiled.function, compiled.packed_metadata, *hooks, *values)
    copy_context().run(_with_memory, memory, lambda: watched(*handed))
    parts = [_part_of(x, places) for x in seen[0]]
    launch = Launch(
        run=launcher.launch,
        args=tuple(None if type(x) in _CHANGING else x for x in parts),
        changes=tuple(_change(i, x) for i, x in enumerate(parts) if type(x) in _CHANGING),
    )
    return launch, sizes


def _with_memory(memory: Callable[..., Any], work: Callable[[], None]) -> None:
    """`work()`, where Triton asks `memory` for memory."""
    import triton

    triton.set_allocator(memory)
    work()


_CHANGING = (Pointer, Nested)


def _part_of(value: Any, places: _Places) -> Any:
    """An argument as it is repeated."""
    if type(value) is Pointer:
        return value
    if isinstance(value, Tensor):
        return places.pointer(value)
    if isinstance(value, tuple):
        parts = tuple(_part_of(x, places) for x in cast("tuple[Any, ...]", value))
        return Nested(parts) if any(type(x) in _CHANGING for x in parts) else value
    return value


def _change(index: int, part: Pointer | Nested) -> Change:
    if isinstance(part, Pointer):
        return Change(index, part.tensor, part.offset, None, None)
    first, *rest = part.parts
    if type(first) is Pointer and not any(type(x) in _CHANGING for x in rest):
        return Change(index, first.tensor, first.offset, tuple(rest), None)
    return Change(index, 0, 0, None, part)
