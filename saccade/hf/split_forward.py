"""The model's own forward, cut behind its decoder: hidden states first, logits of some later.

A prompt needs the logits of its last token alone, but what turns hidden states into logits is the
model's own business: an output matrix with or without bias, a transform before it, soft caps and
multipliers behind it.  So both halves are the model's forward itself.  Its first half ends by an
exception when the decoder has returned; in its second half the decoder returns what it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import RLock
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.core.held_values import holding
from saccade.hf.runs import Undo

ATTRIBUTE: Final = "saccade_decoders"
_LOCK: Final = RLock()
Forward = Callable[..., Any]
Step = Callable[..., Any]
"""Called with the decoder's own forward and the arguments of a call of it."""


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
        _cut(model, decoded, **inputs)
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
    output = _cut(model, given, input_ids=tokens, use_cache=False)
    if not used:
        raise _no_decoder(model)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if logits is None:
        raise Unsupported(
            f"{type(model).__name__} has no output matrix: load a causal language model "
            "(AutoModelForCausalLM)."
        )
    return logits


def counts_from_zero(model: PreTrainedModel) -> bool:
    """Whether the decoder does not ask a cache for its length, so that it needs positions."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    asks = {"get_seq_length", "get_query_offset"}
    codes = [inspect.unwrap(type(part).forward).__code__ for part in model.modules() if takes]
    return takes and not any(asks & set(code.co_names) for code in codes)


def decoders(model: PreTrainedModel) -> list[nn.Module]:
    """What transformers names as the decoder of a model, the model itself apart."""
    inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    named = [model.base_model, model.get_decoder(), *inner]
    found = [part for part in named if isinstance(part, nn.Module) and part is not model]
    return list({id(part): part for part in found}.values())


def _cut(model: PreTrainedModel, half: Callable[[Callable[[], Any]], Any], **inputs: Any) -> Any:
    """What the model returns for these inputs, its decoder being left to `half`."""
    with cuttable(model):
        return holding(_half, half, model, **inputs)


@contextmanager
def cuttable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder of a model has a forward that can be cut off; several may be open."""
    user = object()
    try:
        _watch(model, user)
        yield
    finally:
        _unwatch(model, user)


def serve_steps(undo: Undo, model: PreTrainedModel, step: Step) -> None:
    """Until undone, calls of a decoder that are not cut off are left to `step`."""
    undo.callback(_unwatch, model, step)
    _watch(model, step).step = step


def _watch(model: PreTrainedModel, user: object) -> _Watched:
    with _LOCK:
        watched: _Watched | None = vars(model).get(ATTRIBUTE)
        if watched is None:
            vars(model)[ATTRIBUTE] = watched = _Watched(model)
        watched.users.add(user)
        watched.apply()
        return watched


def _unwatch(model: PreTrainedModel, user: object) -> None:
    """Harmless to repeat."""
    with _LOCK:
        watched: _Watched | None = vars(model).get(ATTRIBUTE)
        if watched is None:
            return
        watched.users.discard(user)
        if watched.step is user:
            watched.step = None
        if not watched.users:
            watched.undo()
            vars(model).pop(ATTRIBUTE, None)


def is_watched(model: PreTrainedModel, part: nn.Module) -> bool:
    """Whether a decoder of the model has no other forward of its own than `cuttable` gave it."""
    watched: _Watched | None = vars(model).get(ATTRIBUTE)
    return watched is not None and watched.is_ours(part)


class _Watched:
    """The decoders of one model, with forwards that look up what to do; undone when unused."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.users: set[object] = set()
        self.step: Step | None = None
        self._changed = [(part, vars(part).get("forward")) for part in decoders(model)]
        self._ours = [self._watched(part.forward) for part, _ in self._changed]
        self._applied = False

    def apply(self) -> None:
        """Give the decoders their forwards, once: other code may replace them afterwards."""
        if not self._applied:
            for (part, _), forward in zip(self._changed, self._ours, strict=True):
                part.forward = forward
        self._applied = True

    def is_ours(self, part: nn.Module) -> bool:
        """Whether the forward of a decoder is the one that can be cut off, over its class's own."""
        return any(
            each is part and old is None and vars(part).get("forward") is ours
            for (each, old), ours in zip(self._changed, self._ours, strict=True)
        )

    def undo(self) -> None:
        """Put the forwards back; one that other code has replaced since stays."""
        for (part, old), ours in zip(self._changed, self._ours, strict=True):
            if vars(part).get("forward") is ours:
                vars(part).pop("forward")
                if old is not None:
                    part.forward = old

    def _watched(self, original: Forward) -> Forward:
        """A forward that leaves what happens to the half in force; the first entered takes it."""

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a ContextVar would break the graph
                return original(*args, **kwargs)
            half, step = _half.get(), self.step
            if half is not None:
                _half.set(None)
                return half(lambda: original(*args, **kwargs))
            return original(*args, **kwargs) if step is None else step(original, *args, **kwargs)

        return forward


def _no_decoder(model: PreTrainedModel) -> Unsupported:
    return Unsupported(
        f"{type(model).__name__} does not call the decoder that transformers names "
        f"({', '.join(type(part).__name__ for part in decoders(model)) or 'none'}), so a Context "
        "cannot read hidden states of it. Use the model as transformers runs it."
    )
