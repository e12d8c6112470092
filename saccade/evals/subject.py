"""What a row measures: a model that reads a context, is scored behind it and writes tokens.

`Ours` is a Context; `Theirs` is the model as its user has it, transformers' forward with its own
cache and attention.  Both read in chunks of the same n_batch and compute no logit nobody asks for.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.compress import compress_context
from saccade.core import Unsupported
from saccade.hf import changes
from saccade.hf.model import HFModel
from saccade.hf.runs import Undo
from saccade.hf.split_forward import counts_from_zero, hidden_states, logits_of
from saccade.runtime import Context, ContextParams, Sampler
from saccade.runtime.importance import token_importance


@dataclass(slots=True)
class Steps:
    """Tokens read one by one, each followed by the choice of the next.

    Attributes:
        logits: `[vocab]` float32 before the first token and behind each.
        stamps: `time.perf_counter()` when each choice was made.
    """

    logits: list[Tensor] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)

    def choose(self, logits: Tensor) -> None:
        """Choose greedily, which waits for the device, and note when that was done."""
        int(logits.argmax())
        self.stamps.append(time.perf_counter())
        self.logits.append(logits.clone())

    def seconds(self) -> list[float]:
        """Of each token."""
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


class Subject(Protocol):
    """One configuration that is being measured."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that its caches hold now."""
        ...

    def read(self, tokens: Tensor) -> None:
        """Read the context, and keep what the configuration keeps of it."""
        ...

    def write(self, tokens: Tensor) -> Steps:
        """Decode, but go on with these tokens instead of those that it chooses."""
        ...

    def states(self, tokens: Tensor) -> Tensor:
        """Read more tokens `[n]` -> hidden states `[n, hidden]`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` float32 of hidden states `[..., hidden]`."""
        ...


@dataclass
class _Given(Sampler):
    """Chooses the tokens that it was given, and notes what a greedy sampler would have seen."""

    tokens: list[int] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)

    def pick(self, logits: Tensor) -> int:
        self.steps.choose(logits)
        return self.tokens[min(len(self.steps.stamps), len(self.tokens)) - 1]


class Ours:
    """A model under ContextParams.

    Args:
        token_share: share of the context's tokens that is kept by token-level compression.
        reserve: tokens that caches are allocated for at once: those that are read and written
            while times and bytes are taken, so that spare room counts for no row.
    """

    def __init__(
        self, model: HFModel, params: ContextParams, token_share: float | None, reserve: int
    ) -> None:
        self._model, self._share = model, token_share
        self.ctx = Context(model, params, reserve=reserve)

    @property
    def cache_bytes(self) -> int:
        return self.ctx.cache_bytes

    def read(self, tokens: Tensor) -> None:
        self.ctx.append(self._kept(tokens))
        self.ctx.compress()

    def _kept(self, tokens: Tensor) -> Tensor:
        """The context, or the share of its tokens that the model itself finds important."""
        if self._share is None:
            return tokens
        # What compression keeps of the caches is chosen from the queries that read the kept tokens.
        whole = replace(self.ctx.params, kv_policy=None, kv_budget=None)
        with Context(self._model, whole) as ctx:
            scores = token_importance(ctx, tokens)
        return compress_context(tokens, scores, round(self._share * len(tokens)))

    def write(self, tokens: Tensor) -> Steps:
        sampler = _Given(tokens=tokens.tolist())
        for _ in self.ctx.stream((), n_predict=len(tokens), sampler=sampler):
            pass
        return sampler.steps

    def states(self, tokens: Tensor) -> Tensor:
        return self.ctx.append(tokens, wanted=len(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.ctx.logits(hidden)


class Theirs:
    """transformers' own forward, attention and cache; inside `implementation`."""

    def __init__(self, model: PreTrainedModel, n_batch: int) -> None:
        self._model, self._n_batch = model, n_batch
        self._cache: Any = None
        self._seen = 0
        self._last: Tensor | None = None
        takes = inspect.signature(model.forward).parameters
        self._one_logit = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._says_positions = counts_from_zero(model)

    @property
    def cache_bytes(self) -> int:
        """Storages of the tensors that the layers of the cache refer to."""
        layers = getattr(self._cache, "layers", ())
        tensors = [x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> None:
        for part in tokens.split(self._n_batch):
            self._last = self._forward(part)

    @torch.inference_mode()
    def write(self, tokens: Tensor) -> Steps:
        steps = Steps()
        assert self._last is not None, "the context is read first"
        steps.choose(self._last)
        for token in tokens.split(1):
            steps.choose(self._forward(token))
        return steps

    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits `[vocab]` float32 behind the last of some tokens."""
        inputs = self._inputs(tokens)
        output = self._model(**inputs, **self._one_logit)
        self._cache = output.past_key_values
        return output.logits[0, -1].float()

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        device, start = self._model.device, self._seen
        self._seen += len(tokens)
        ids = tokens[None].to(device)
        inputs = {"input_ids": ids, "past_key_values": self._cache, "use_cache": True}
        if self._says_positions:
            inputs["position_ids"] = torch.arange(start, self._seen, device=device)[None]
        return inputs

    @torch.inference_mode()
    def states(self, tokens: Tensor) -> Tensor:
        parts = tokens.split(self._n_batch)
        return torch.cat([hidden_states(self._model, **self._inputs(part))[0] for part in parts])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self._model, hidden[None])[0].float()


def _switch(undo: Undo, model: PreTrainedModel, name: str) -> None:
    try:
        changes.set_implementation(undo, model, name)
    except ValueError as error:  # transformers says it with a request to open an issue
        raise Unsupported(
            f"transformers has no {name} attention for {type(model).__name__}."
        ) from error


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with an attention of transformers, "eager" or "sdpa"; restored on exit.

    Raises:
        Unsupported: a model without it.
    """
    undo = Undo()
    try:
        _switch(undo, model, name)
        yield
    finally:
        undo.run()
