"""Rotary positions left for the cache to apply, so that turning and storing are one kernel.

transformers turns queries and keys by some ten small kernels, then hands the keys to the cache.
During a step of decoding its `apply_rotary_pos_emb` returns promises instead.  A model's own code
passes them on untouched; the cache keeps the promise for both while it stores the keys.  Whoever
else touches a promise gets the tensor that it stands for, turned the usual way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, Final

import torch
from torch import Tensor, nn

from saccade.ops.kv_write.append import apply_pending, apply_rope_qk
from saccade.ops.kv_write.records import PendingRope

NAME: Final = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]

_deferring: ContextVar[bool] = ContextVar("saccade_deferring", default=False)


class Promise:
    """Queries and keys that are still to be turned."""

    def __init__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, usual: Rotary) -> None:
        self.k, self.rope = k, PendingRope(q, cos, sin)
        self._usual = usual
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def keep(self, q: Tensor | None) -> None:
        """The cache has turned the queries, and stored the keys."""
        assert q is not None
        self._kept = q, None

    def result(self, index: int) -> Tensor:
        """Queries (0) or keys (1) as tensors."""
        found = None if self._kept is None else self._kept[index]
        if found is None:
            if self.k.is_cuda:
                self._kept = apply_rope_qk(self.k, self.rope)
            else:
                self._kept = self._usual(self.rope.q, self.k, self.rope.cos, self.rope.sin)
            found = self._kept[index]
        assert found is not None
        return found


class Promised:
    """Stands for the queries or for the keys of a Promise."""

    __slots__ = ("_index", "promise")

    def __init__(self, promise: Promise, index: int) -> None:
        self.promise, self._index = promise, index

    def tensor(self) -> Tensor:
        """What it stands for."""
        return self.promise.result(self._index)

    @property
    def shape(self) -> torch.Size:
        """Turning changes no shape."""
        return (self.promise.k if self._index else self.promise.rope.q).shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: settled(arg) for name, arg in (kwargs or {}).items()}
        return func(*(settled(arg) for arg in args), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]


def settled(x: Any) -> Any:
    """A promise as the tensor it stands for; anything else as it is."""
    return x.tensor() if isinstance(x, Promised) else x


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, models attached by saccade leave rotary positions to the cache."""
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


def deferring(usual: Rotary) -> Rotary:
    """`apply_rotary_pos_emb` as it was, except inside `deferred()`."""

    @wraps(usual)
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if not _deferring.get() or args or kwargs or not whole:
            return usual(q, k, cos, sin, *args, **kwargs)
        promise = Promise(q, k, cos, sin, usual)
        return Promised(promise, 0), Promised(promise, 1)

    return apply_rotary_pos_emb


def rotary_places(modules: list[nn.Module]) -> list[tuple[Any, Rotary]]:
    """(module of code, its rotary function) behind attention modules, where it turns by halves."""
    places = {type(module).__module__: sys.modules[type(module).__module__] for module in modules}
    found = [(code, getattr(code, NAME, None)) for code in places.values()]
    return [(code, usual) for code, usual in found if usual is not None and turns_by_halves(usual)]


@cache
def turns_by_halves(usual: Rotary) -> bool:
    """Whether a rotary function is the one that our kernel computes: asked by an example."""
    q, k = torch.linspace(-1, 2, 24).view(1, 2, 3, 4), torch.linspace(3, -2, 12).view(1, 1, 3, 4)
    half = torch.linspace(0, 1, 6).view(1, 3, 2)
    cos, sin = torch.cat((half, half), -1), torch.cat((1 - half, 1 - half), -1)
    try:
        answer = usual(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = [apply_pending(x, PendingRope(q, cos, sin)) for x in (q, k)]
    return all(torch.allclose(ours, a) for ours, a in zip(expected, answer, strict=True))
