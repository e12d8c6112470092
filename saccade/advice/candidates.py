"""Candidates: settings worth trying where memory is short, the most exact first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Final

from saccade.runtime.model import ModelFacts
from saccade.runtime.no_effect import without_effect
from saccade.runtime.params import ContextParams

WINDOW: Final[dict[str, object]] = {"n_swa": 4096, "n_sinks": 4}
RULE: Final = (
    "The first that fits, most exact first (exact, bf16, int8, int8 keys with int4 values, then "
    "exact with keys in host memory, which is slow, int4, weights of 8 and of 4 bits where that is "
    "less than they take, SnapKV, window with sinks)."
)
SETTINGS: Final[dict[str, dict[str, object]]] = {
    "exact": {},
    "bf16 cache": {"type_k": "bf16", "type_v": "bf16"},
    "int8 cache": {"type_k": "int8", "type_v": "int8"},
    "int8 keys, int4 values": {"type_k": "int8", "type_v": "int4"},
    "exact, keys in host memory": {"offload_kqv": False},
    "int4 cache": {"type_k": "int4", "type_v": "int4"},
    "int8 weights": {"weights": "int8"},
    "int8 weights, int8 cache": {"weights": "int8", "type_k": "int8", "type_v": "int8"},
    "int8 weights, int4 cache": {"weights": "int8", "type_k": "int4", "type_v": "int4"},
    "int4 weights": {"weights": "int4"},
    "int4 weights, int8 cache": {"weights": "int4", "type_k": "int8", "type_v": "int8"},
    "int4 weights, int4 cache": {"weights": "int4", "type_k": "int4", "type_v": "int4"},
    "SnapKV, 25 % kept": {"kv_policy": "snapkv", "kv_budget": 0.25},
    "window 4096 + 4 sinks": WINDOW,
    "window 4096 + 4 sinks, bf16": {**WINDOW, "type_k": "bf16", "type_v": "bf16"},
}
"""Settings by name, in the order of RULE; adding one is one line.

`weights` is `load_model`'s, all others are fields of ContextParams.
"""
_CHUNKS: Final = {"cpu": (512,), "cuda": (8192, 4096, 2048, 512)}
"""Sizes of the chunks in which a prompt is read, the faster first; results are the same."""
_SETTLED: Final = frozenset(
    (
        "type_k",
        "type_v",
        "n_swa",
        "n_sinks",
        "page_size",
        "kv_policy",
        "kv_budget",
        "sparse",
        "offload_kqv",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A setting.

    Attributes:
        name: for tables; rank: how exact, 0 first.
        params: the options of the run, in full.
        weights: another form of the weights, None for the one that was asked for.
    """

    name: str
    rank: int
    params: ContextParams
    weights: str | None = None


def candidates(
    facts: ModelFacts,
    asked: ContextParams,
    device: str,
    tokens: int,
    *,
    chunk_is_asked: bool = False,
    weights: Collection[str] = (),
) -> Iterator[Candidate]:
    """Settings beside the options that were asked for, without those that change nothing.

    Options that settle how keys are kept (a type, a window, a policy) leave one setting.

    Args:
        device: "cpu" or "cuda"; tokens: of the context.
        chunk_is_asked: n_batch stays as it is.
        weights: forms of the weights that take less than the one asked for.
    """
    default = ContextParams()
    settled = any(getattr(asked, name) != getattr(default, name) for name in _SETTLED)
    settings = _as_asked(weights) if settled else SETTINGS
    sizes = (asked.n_batch,) if chunk_is_asked else _CHUNKS[device]
    for rank, (name, given) in enumerate(settings.items()):
        options = {key: value for key, value in given.items() if key != "weights"}
        held = str(given["weights"]) if "weights" in given else None
        if held is not None and held not in weights:
            continue
        for size in sizes:
            params = _with(asked, {**options, "n_batch": size})
            full = None if params is None else replace(params, n_ctx=tokens)
            if params is not None and full and _matters(facts, full, options, device):
                yield Candidate(name=name, rank=rank, params=params, weights=held)


def _as_asked(weights: Collection[str]) -> dict[str, dict[str, object]]:
    """What was asked for, and the same with smaller weights."""
    choices: dict[str, dict[str, object]] = {"as asked": {}}
    choices |= {f"as asked, {name} weights": {"weights": name} for name in weights}
    return choices


def _with(asked: ContextParams, options: dict[str, object]) -> ContextParams | None:
    """The options together, None where they contradict each other."""
    try:
        return replace(asked, **options)  # type: ignore[arg-type]
    except ValueError:
        return None


def _matters(facts: ModelFacts, params: ContextParams, options: Iterable[str], device: str) -> bool:
    """Whether every one of these options changes something for this model on this device."""
    return not without_effect(facts, params, device=device).keys() & set(options)


def changed(params: ContextParams) -> dict[str, object]:
    """The options that differ from the defaults."""
    default = ContextParams()
    every = ((each.name, getattr(params, each.name)) for each in fields(ContextParams))
    return {name: value for name, value in every if value != getattr(default, name)}
