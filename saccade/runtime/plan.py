"""A plan: the memory a model needs under its options, known before anything is loaded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from saccade.core import BadInput
from saccade.runtime.memory import AttentionPeak, cache_bytes, chunks
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.units import as_bytes

WINDOW: dict[str, object] = {"n_swa": 4096, "n_sinks": 4}
ALTERNATIVES: dict[str, dict[str, object]] = {
    "full precision": {},
    "bf16 cache": {"type_k": "bf16", "type_v": "bf16"},
    "int8 cache": {"type_k": "int8", "type_v": "int8"},
    "int8 keys, int4 values": {"type_k": "int8", "type_v": "int4"},
    "int4 cache": {"type_k": "int4", "type_v": "int4"},
    "window 4096 + 4 sinks": WINDOW,
    "window 4096 + 4 sinks, bf16": {**WINDOW, "type_k": "bf16", "type_v": "bf16"},
}
"""Settings to try where memory is short; adding one is one line."""

_RESET: dict[str, object] = {
    **dict.fromkeys(("type_k", "type_v", "n_swa", "page_size", "kv_policy", "kv_budget")),
    **{"n_sinks": 0, "ctx_checkpoints": 0, "offload_kqv": True},
}
_MAX_TOKENS = 1 << 27  # a setting that fits these counts as without limit
_NUM_CHUNKS = 16  # most appends in which a found length is checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One setting compared with an amount of memory.

    Attributes:
        setting: its name.
        needed: bytes for the whole context of the plan.
        fits: whether the memory is enough for them.
        longest: most tokens of context that fit, 0 where none does, None where there is no limit.
    """

    setting: str
    needed: int
    fits: bool
    longest: int | None


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

    def what_fits(self, memory: int) -> list[Fit]:
        """The options of this plan and ALTERNATIVES to them, against `memory` bytes.

        Caches are allocated at once (`reserve`), which takes the least memory.

        Raises:
            BadInput: `memory` is no number of bytes.
        """
        if not isinstance(memory, int) or memory < 0:  # type: ignore[reportUnnecessaryIsInstance]
            raise BadInput(f"memory must be a number of bytes, 0 or more, got {memory!r}.")
        found = [self._fit("as asked", self.params, memory)]
        for name, options in ALTERNATIVES.items():
            params = _with_options(self.params, options)
            if params is not None and params != self.params:
                found.append(self._fit(name, params, memory))
        return found

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

    def _fit(self, setting: str, params: ContextParams, memory: int) -> Fit:
        room = memory - (self.weights_bytes or 0)
        needed = _bytes_at_once(self.facts, params, self.n_ctx)
        longest = _longest(self.facts, params, room)
        return Fit(
            setting=setting,
            needed=needed + memory - room,
            fits=needed <= room,
            longest=longest,
        )


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


def _with_options(params: ContextParams, options: dict[str, object]) -> ContextParams | None:
    """`params` with these options instead of its windows, policies and storage types.

    None where they conflict with the other options.
    """
    try:
        return replace(params, **{**_RESET, **options})  # type: ignore[arg-type]
    except ValueError:
        return None


def _bytes_at_once(facts: ModelFacts, params: ContextParams, tokens: int) -> int:
    """Bytes of caches that are allocated at once, and of attention over them."""
    steps = chunks(tokens, max(params.n_batch, -(-tokens // _NUM_CHUNKS)))
    caches = cache_bytes(facts, params, steps, reserve=tokens)
    return caches + AttentionPeak(facts, params).at(tokens)


def _longest(facts: ModelFacts, params: ContextParams, room: int) -> int | None:
    """Most tokens that fit into `room` bytes, 0 for none, None where there is no limit."""
    attention = AttentionPeak(facts, params)

    def about(tokens: int) -> int:
        caches = cache_bytes(facts, params, [(tokens, 1)], reserve=tokens)
        return caches + attention.about(tokens)

    low = 1
    while low < _MAX_TOKENS and about(low) <= room:
        low *= 2
    if low >= _MAX_TOKENS:
        return None
    longest = bisect_right(range(1, low), room, key=about)
    while longest and _bytes_at_once(facts, params, longest) > room:
        longest -= max(1, longest // 256)  # `about` underestimated
    return longest
