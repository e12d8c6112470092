"""What callers pass, checked before anything is read: a model, options, tokens, counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.runtime.params import ContextParams


def token_ids(tokens: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """The ids as int64 `[n]` on the host.

    Raises:
        BadInput: not a flat sequence of whole numbers from 0 to vocab_size - 1.
    """
    found = _as_tensor(tokens)
    if found.ndim != 1:
        raise BadInput(
            f"expected token ids in one dimension, [n], got the shape {list(found.shape)}. "
            "Give the tokens of one sequence, such as ids[0]."
        )
    if not found.numel():
        return torch.empty(0, dtype=torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise BadInput(
            f"expected token ids as whole numbers, got {found.dtype}. Give the ids that a "
            "tokenizer returns, as a list or an int64 tensor."
        )
    found = found.detach().to("cpu", torch.int64)
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise BadInput(
            f"token {wrong} is outside the vocabulary: expected ids from 0 to {vocab_size - 1}. "
            "Give the ids of this model's own tokenizer."
        )
    return found


def _as_tensor(tokens: Any) -> Tensor:
    wrong = isinstance(tokens, str | bytes) or any(
        isinstance(each, bool) for each in (tokens if isinstance(tokens, list | tuple) else ())
    )
    try:
        found = torch.empty(0) if wrong else torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _no_ids(tokens) from error
    if wrong or found.is_meta or found.layout != torch.strided or found.is_quantized:
        raise _no_ids(tokens)
    return found


def _no_ids(tokens: Any) -> BadInput:
    said = repr(tokens) if isinstance(tokens, str | bytes | list | tuple) else ""
    shown = f"{type(tokens).__name__} {said[:40]}".strip()
    return BadInput(
        f"expected token ids as a list or tensor of whole numbers, got {shown}. Turn text into "
        "ids with the model's tokenizer first."
    )


def whole_number(name: str, value: Any, *, least: int) -> int:
    """`value` if it is a whole number of at least `least`.

    Raises:
        BadInput: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(
            f"{name} must be a whole number, got {value!r}. Give an int of at least {least}."
        )
    if value < least:
        raise BadInput(f"{name} must be at least {least}, got {value}. Give {least} or more.")
    return value


def stop_tokens(stop: Iterable[int]) -> set[int]:
    """The ids at which generation ends.

    Raises:
        BadInput: not an iterable of whole numbers.
    """
    try:
        found = set(stop) if not isinstance(stop, str | bytes) else {""}
    except TypeError:
        found = {""}
    if any(isinstance(each, bool) or not isinstance(each, int) for each in found):
        raise BadInput(
            f"expected stop as token ids, such as [2], got {str(stop)[:40]!r}. Turn text into ids "
            "with the model's tokenizer first."
        )
    return found  # type: ignore[return-value]


def check_types(model: Any, params: Any) -> None:
    """Raise TypeError unless these are a model that can run and options (or None)."""
    if not hasattr(model, "attached"):
        raise TypeError(
            f"expected a loaded model, a model of transformers or a runtime.Model, got "
            f"{type(model).__name__}. Load one with saccade.load_model."
        )
    if params is not None and not isinstance(params, ContextParams):
        raise TypeError(
            f"expected ContextParams or None, got {type(params).__name__}. Give "
            "ContextParams(n_ctx=...)."
        )
