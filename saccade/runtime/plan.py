"""A plan: the memory a model needs under its options, known before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saccade.core import BadInput
from saccade.runtime.memory import AttentionPeak, cache_bytes, chunks
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.units import as_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Memory of a model that reads `n_ctx` tokens.

    Attributes:
        facts, params: of the model and of the run.
        n_ctx: tokens in context at the end.
        prompt: how many of them are read in chunks; the others are read one at a time.
        reserve: tokens that caches allocate for at once; 0: they grow.
        weights_bytes: of the model's parameters, None where unknown.
        cache_bytes: allocated by all caches when the context is full, exactly.
            Two things are not known beforehand: how heads share a budget they compete for (assumed
            to keep equally many keys, which is right to a page a head), and staging buffers on a
            GPU for keys in host memory (not counted).
        most_cache_bytes: the largest size of all caches, before a kv_policy removes keys.
        attention_bytes: peak of attention beside the caches; see `memory.AttentionPeak`.
    """

    facts: ModelFacts
    params: ContextParams
    n_ctx: int
    prompt: int
    reserve: int
    weights_bytes: int | None
    cache_bytes: int
    most_cache_bytes: int
    attention_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, caches and attention; not the hidden states of a chunk, nor PyTorch itself."""
        return (self.weights_bytes or 0) + self.most_cache_bytes + self.attention_bytes

    def __str__(self) -> str:
        """The plan as a table."""
        return "\n".join(f"{name:<22}{value}" for name, value in self.lines())

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, how much) of the plan."""
        yield "model", self.facts.name
        beyond = self.n_ctx > self.facts.n_ctx_train
        trained = f" (trained for {self.facts.n_ctx_train:,})" if beyond else ""
        yield "context", f"{self.n_ctx:,} tokens{trained}"
        weights = "unknown" if self.weights_bytes is None else as_bytes(self.weights_bytes)
        yield "weights", weights
        per_token = as_bytes(self.cache_bytes / self.n_ctx)
        yield "cache", f"{as_bytes(self.cache_bytes)}, {per_token} a token"
        if self.most_cache_bytes != self.cache_bytes:
            yield "  while reading", as_bytes(self.most_cache_bytes)
        yield "attention, at most", as_bytes(self.attention_bytes)
        yield "together", as_bytes(self.total_bytes)


def make_plan(
    facts: ModelFacts,
    params: ContextParams | None = None,
    n_ctx: int | None = None,
    *,
    prompt: int | None = None,
    reserve: int = 0,
    weights_bytes: int | None = None,
) -> Plan:
    """The plan for a model of these facts; see `saccade.plan`.

    Raises:
        BadInput: n_ctx below 1, a prompt outside 1 .. n_ctx, reserve below 0, more bytes than can
            be counted.
    """
    params = params or ContextParams()
    if n_ctx is None:
        n_ctx = params.n_ctx or facts.n_ctx_train
    prompt = n_ctx if prompt is None else prompt
    _check_sizes(n_ctx, prompt, reserve)
    read, written = chunks(prompt, params.n_batch), [(1, n_ctx - prompt)]
    most = cache_bytes(facts, params, read, reserve=reserve)
    full = cache_bytes(facts, params, read, written, reserve=reserve)
    return Plan(
        facts=facts,
        params=params,
        n_ctx=n_ctx,
        prompt=prompt,
        reserve=reserve,
        weights_bytes=weights_bytes,
        cache_bytes=full,
        most_cache_bytes=max(most, full),
        attention_bytes=AttentionPeak(facts, params).at(prompt),
    )


def _check_sizes(*sizes: object) -> None:
    """Raise BadInput unless (n_ctx, prompt, reserve) are whole numbers that fit together."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    n_ctx, prompt, reserve = sizes
    if not whole or n_ctx < 1 or not 0 < prompt <= n_ctx or reserve < 0:  # type: ignore[operator]
        raise BadInput(
            "a plan needs whole numbers with n_ctx >= 1, a prompt of 1 to n_ctx tokens and reserve "
            f">= 0, got {n_ctx!r}, {prompt!r} and {reserve!r}."
        )
