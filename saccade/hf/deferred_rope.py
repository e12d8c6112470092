"""Deferred RoPE: the cache applies it while it stores K, so that both are one kernel.

transformers rotates queries and keys by some ten small kernels, then passes the keys to the cache.
Inside `deferred` its `apply_rotary_pos_emb` returns DeferredTensors instead.  A model's own code
passes them on unchanged; the cache rotates both while it stores the keys.  Any other operation on
a DeferredTensor first computes the rotated tensor, as transformers would have.

The global function of transformers is not replaced.  An attention module of an allowlisted class
gets a copy of its class's `forward` in which that global is the deferring function; the copy is an
attribute of that module alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, update_wrapper, wraps
from types import FunctionType, MethodType
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from saccade.core.held_values import holding
from saccade.hf.allowlist import is_rotary_function, kind_of
from saccade.ops.kv_write.append import apply_rope_qk
from saccade.ops.kv_write.records import PendingRope

NAME: Final = "apply_rotary_pos_emb"
RotaryFunction = Callable[..., tuple[Tensor, Tensor]]

R = TypeVar("R")
P = ParamSpec("P")
_deferring: ContextVar[bool] = ContextVar("saccade_deferring", default=False)


class DeferredRope:
    """Queries and keys `[B, H, t, D]` that RoPE has not been applied to yet.

    Attributes:
        k: the keys; rope: the queries, cos and sin.
    """

    def __init__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, original: RotaryFunction
    ) -> None:
        self.k, self.rope = k, PendingRope(q, cos, sin)
        self._original = original
        self._rotated: tuple[Tensor, Tensor | None] | None = None

    def stored(self, q: Tensor | None) -> None:
        """Keep the rotated queries: the cache has rotated both, and stored the keys."""
        assert q is not None
        self._rotated = q, None

    def rotated(self, index: int) -> Tensor:
        """Queries (0) or keys (1) with RoPE applied."""
        found = None if self._rotated is None else self._rotated[index]
        if found is None:
            if self.k.is_cuda:
                self._rotated = apply_rope_qk(self.k, self.rope)
            else:
                self._rotated = self._original(self.rope.q, self.k, self.rope.cos, self.rope.sin)
            found = self._rotated[index]
        assert found is not None
        return found


class DeferredTensor:
    """Stands for the queries or for the keys of a DeferredRope; any operation materializes it."""

    __slots__ = ("_index", "deferred")

    def __init__(self, deferred: DeferredRope, index: int) -> None:
        self.deferred, self._index = deferred, index

    def tensor(self) -> Tensor:
        """The rotated tensor."""
        return self.deferred.rotated(self._index)

    @property
    def shape(self) -> torch.Size:
        """RoPE changes no shape."""
        return (self.deferred.k if self._index else self.deferred.rope.q).shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: materialize(arg) for name, arg in (kwargs or {}).items()}
        return func(*(materialize(arg) for arg in args), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]


def materialize(x: Any) -> Any:
    """A DeferredTensor as the rotated tensor; anything else as it is."""
    return x.tensor() if isinstance(x, DeferredTensor) else x


def deferred(call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """`call(*args, **kwargs)`, RoPE left to caches by each `deferring_forward`."""
    return holding(_deferring, True, call, *args, **kwargs)


def deferring_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention module that defers RoPE inside `deferred`.

    None where the class is not listed, or calls a rotary function that is not.
    """
    if kind_of(type(module)) != "attention":
        return None
    forward = vars(type(module))["forward"]
    calls = NAME in forward.__code__.co_names and forward.__closure__ is None
    if not calls or not is_rotary_function(forward.__globals__.get(NAME)):
        return None
    copied = MethodType(_with_deferring(forward, forward.__globals__[NAME]), module)
    original = module.forward

    @wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        """torch.compile looks globals up by the name of the module, so it gets the original."""
        return (original if torch.compiler.is_compiling() else copied)(*args, **kwargs)

    return either


@cache
def _with_deferring(forward: FunctionType, rotary: RotaryFunction) -> FunctionType:
    """A copy of `forward` that calls the deferring function; the original is not changed."""
    names = forward.__globals__ | {NAME: deferring(rotary)}
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(copied, forward)
    return copied


def deferring(original: RotaryFunction) -> RotaryFunction:
    """`apply_rotary_pos_emb` as it was, except inside `deferred`."""

    @wraps(original)
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        covers_head = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if (
            torch.compiler.is_compiling()
            or not _deferring.get()
            or args
            or kwargs
            or not covers_head
        ):
            return original(q, k, cos, sin, *args, **kwargs)
        both = DeferredRope(q, k, cos, sin, original)
        return DeferredTensor(both, 0), DeferredTensor(both, 1)

    return apply_rotary_pos_emb
