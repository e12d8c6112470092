"""Rotary tables that change with the length of the text: dynamic NTK and LongRoPE.

transformers takes the table from the largest position of each call.  A text that is read in several
calls then has keys of one table and queries of another, which cannot be compared.  Here a text has
one table: whoever reads it says how long it will be (`reaching`), and reads it again where it grows
past that table.  What a module remembers of the lengths it has seen is never used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from saccade.core.held_values import holding

R = TypeVar("R")
P = ParamSpec("P")
_reached: ContextVar[int | None] = ContextVar("saccade_reached", default=None)


def reaching(length: int | None, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """`call(*args, **kwargs)` under the tables of a text of `length` tokens.

    Args:
        length: None: of each call's positions.
    """
    return holding(_reached, length, call, *args, **kwargs)


def reached() -> int | None:
    """The length given to `reaching`."""
    return _reached.get()


class FittedRotary:
    """A rotary module of transformers whose table follows the length of the text.

    Calls neither change the module nor depend on the lengths it was called with before.

    Attributes:
        positions: those of the last call.
    """

    follows_length = True

    def __init__(self, module: nn.Module) -> None:
        self.module = pristine(module)
        self.positions: Tensor | None = None

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward returns, under the table of the length in force."""
        self.positions, length = position_ids, reached()
        if length is None:
            return self._call(x, position_ids, *args, **kwargs)
        # The module looks at its largest position: it gets one more column, which is cut off again.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        answer = self._call(x, torch.cat((position_ids, last), dim=-1), *args, **kwargs)
        if isinstance(answer, tuple):
            return tuple(table[..., :-1, :] for table in answer)
        return answer[..., :-1, :]

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        fresh = pristine(self.module)
        answer = fresh(*args, **kwargs)
        # LongRoPE's second table depends on no length: made anew, it could not be in a CUDA graph.
        made = {name: x for name, x in vars(fresh).items() if name.endswith("long_inv_freq")}
        vars(self.module).update(made)
        return answer

    def asked(self) -> nn.Module:
        """A copy of the module, its buffers as the length in force makes them."""
        fresh, length = pristine(self.module), reached()
        device = next(fresh.buffers()).device
        x = torch.zeros(1, 1, 1, device=device)
        at = torch.full((1, 1), 0 if length is None else length - 1, device=device)
        for kind in rope_types(fresh):
            fresh(x, at) if kind is None else fresh(x, at, kind)
        return fresh

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths that have the same tables."""
        return tuple(_table_key(self.module, own, length) for own in rope_types(self.module))


def rope_types(module: nn.Module) -> dict[str | None, str]:
    """Layer type, or None where the module has one table for all, -> transformers' name."""
    kinds: Any = module.rope_type
    return dict(kinds) if isinstance(kinds, Mapping) else {None: kinds}


def follows_length(module: nn.Module) -> bool:
    """Whether a table of the module changes with the length of the text."""
    return any("dynamic" in kind or kind == "longrope" for kind in rope_types(module).values())


def thresholds(module: Any, own: str | None) -> list[int]:
    """The length past which the table of a layer type changes, if there is one."""
    kind = rope_types(module)[own]
    if "dynamic" in kind:
        return [module.original_max_seq_len]
    if kind == "longrope":
        given = module.config.rope_parameters
        return [(given if own is None else given[own])["original_max_position_embeddings"]]
    return []


def _table_key(module: nn.Module, own: str | None, length: int) -> Hashable:
    every_token = "dynamic" in rope_types(module)[own]
    past = (max(length - at, 0) for at in thresholds(module, own))
    return tuple(more if every_token else more > 0 for more in past)


def pristine(module: nn.Module) -> nn.Module:
    """A copy of a rotary module as it was built, with buffers of its own."""
    copied: Any = copy.copy(module)
    held = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    copied._buffers = {name: buffer.clone() for name, buffer in held.items()}
    vars(copied).pop("forward", None)
    for name in [name for name in copied._buffers if name.endswith("inv_freq")]:
        prefix = name.removesuffix("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if isinstance(original, Tensor):
            copied._buffers[name] = original.to(copied._buffers[name].device, copy=True)
        vars(copied).pop(f"{prefix}max_seq_len_cached", None)
    if hasattr(module, "original_max_seq_len"):
        copied.max_seq_len_cached = copied.original_max_seq_len
    return copied
