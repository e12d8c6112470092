"""The model's own forward, cut behind its decoder: hidden states first, logits of some of them later.

A prompt needs the logits of its last token alone, but what turns hidden states into logits is the
model's own business: an output matrix with or without bias, a transform before it, soft caps and
multipliers behind it.  So both halves are the model's forward itself.  Its first half ends by an
exception when the decoder has returned; in its second half the decoder returns what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.changes import override

ATTRIBUTE: Final = "saccade_decoders"


class _Decoded(BaseException):
    """The output of the decoder; no code of transformers catches it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Given(dict[str, Any]):
    """An output of a decoder that holds hidden states and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return (self["last_hidden_state"],)[key]
        return self.get(key)


_half: ContextVar[Callable[[Callable[[], Any]], Any] | None] = ContextVar(
    "saccade_half", default=None
)
"""What the outermost decoder that is entered does with its own computation."""


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Hidden states `[B, t, hidden]` of the decoder in `model(**inputs)`.

    Raises:
        Unsupported: the model does not call what transformers names as its decoder.
    """

    def decoded(compute: Callable[[], Any]) -> Any:
        output = compute()
        raise _Decoded(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    try:
        with _cut(model, decoded):
            model(**inputs)
    except _Decoded as found:
        return found.hidden
    raise _no_decoder(model)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `[B, t, vocab]` that the model computes from hidden states `[B, t, hidden]`.

    Raises:
        Unsupported: a model without logits.
    """
    used = False

    def given(compute: Callable[[], Any]) -> Any:
        nonlocal used
        used = True
        return _Given(last_hidden_state=hidden)

    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with _cut(model, given):
        output = model(input_ids=tokens, use_cache=False)
    if not used:
        raise _no_decoder(model)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if logits is None:
        raise Unsupported(
            f"{type(model).__name__} has no output matrix: load a causal language model "
            "(AutoModelForCausalLM)."
        )
    return logits


def decoders(model: PreTrainedModel) -> list[nn.Module]:
    """What transformers names as the decoder of a model, the model itself apart."""
    named = [model.base_model, model.get_decoder()]
    found = [part for part in named if isinstance(part, nn.Module) and part is not model]
    return list({id(part): part for part in found}.values())


@contextmanager
def _cut(model: PreTrainedModel, half: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    with ExitStack() as undo:
        if ATTRIBUTE not in vars(model):
            watch_decoders(undo, model)
        undo.callback(_half.reset, _half.set(half))
        yield


def watch_decoders(undo: ExitStack, model: PreTrainedModel) -> None:
    """Let the decoder of a model be cut off, until `undo` closes."""
    override(undo, model, ATTRIBUTE, True)
    for part in decoders(model):
        override(undo, part, "forward", _watched(part.forward))


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that leaves what happens to the half in force; the first one entered takes it."""

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        half = _half.get()
        if half is None:
            return original(*args, **kwargs)
        _half.set(None)
        return half(lambda: original(*args, **kwargs))

    return forward


def _no_decoder(model: PreTrainedModel) -> Unsupported:
    return Unsupported(
        f"{type(model).__name__} does not call the decoder that transformers names "
        f"({', '.join(type(part).__name__ for part in decoders(model)) or 'none'}), so a Context "
        "cannot read hidden states of it. Use the model as transformers runs it."
    )
