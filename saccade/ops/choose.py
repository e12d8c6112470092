"""Which backend computes a call: an explicit one never falls back, `auto` takes the first able.

Adding a backend is one file with `refusal(call)` and `run(call)` and one line in BACKENDS.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Protocol, cast

from saccade.core import AttentionOutput, Unsupported
from saccade.ops.attend import cpu, reference, sdpa, tiled
from saccade.ops.call import AttentionCall

BACKENDS: dict[str, str] = {
    "reference": "saccade.ops.attend.reference",
    "tiled": "saccade.ops.attend.tiled",
    "cpu": "saccade.ops.attend.cpu",
    "sdpa": "saccade.ops.attend.sdpa",
}

# Fastest first, by measurement (benchmarks/results); the last one runs everything in O(N) memory.
AUTO_ORDER = ("cpu", "sdpa", "tiled")


# Those that need torch alone are there from the start, so that torch.compile meets no import.
_LOADED: dict[str, ModuleType] = {
    "reference": reference,
    "tiled": tiled,
    "sdpa": sdpa,
    "cpu": cpu,
}


class Backend(Protocol):
    """What a backend module offers."""

    def refusal(self, call: AttentionCall) -> str | None:
        """Why this backend cannot run the call, or None."""
        ...

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute the call."""
        ...


def load(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}.")
    if name not in _LOADED:
        _LOADED[name] = import_module(BACKENDS[name])
    return cast(Backend, _LOADED[name])


def choose(call: AttentionCall, backend: str) -> Backend:
    """The backend that will run the call.

    Raises:
        ValueError: no such backend.
        Unsupported: the named backend cannot run this call.
    """
    if backend != "auto":
        chosen = load(backend)
        reason = chosen.refusal(call)
        if reason is not None:
            raise Unsupported(
                f'attention(backend="{backend}") cannot run this call: {reason}. '
                'Use backend="auto" or "tiled".'
            )
        return chosen
    for name in AUTO_ORDER:
        candidate = load(name)
        if candidate.refusal(call) is None:
            return candidate
    raise AssertionError("the last backend of AUTO_ORDER runs every call")


def explain(call: AttentionCall) -> list[tuple[str, str]]:
    """(backend, verdict) for each backend, in the order `auto` asks them."""
    lines: list[tuple[str, str]] = []
    taken = False
    for name in (*AUTO_ORDER, *(n for n in BACKENDS if n not in AUTO_ORDER)):
        reason = load(name).refusal(call)
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif name not in AUTO_ORDER:
            verdict = "able, but only by name: it materialises the scores"
        elif taken:
            verdict = "able, slower here"
        else:
            verdict, taken = "chosen", True
        lines.append((name, verdict))
    return lines
