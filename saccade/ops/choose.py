"""Which backend computes a call: an explicit one never falls back, `auto` takes the first able.

Adding a backend is one file with `refusal(call)` and `run(call)` and one line in BACKENDS.  A
backend's module is imported here, so it imports what is heavy (Triton) only to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from saccade.core import AttentionOutput, Unsupported
from saccade.ops.attend import cpu, gluon, gluon_fp8, reference, sdpa, tiled, triton
from saccade.ops.call import AttentionCall

# Fastest first, by measurement (benchmarks/results); the last one runs everything in O(N) memory.
AUTO_ORDER = ("gluon", "gluon_fp8", "triton", "cpu", "sdpa", "tiled")


class Backend(Protocol):
    """What a backend module offers."""

    def refusal(self, call: AttentionCall) -> str | None:
        """Why this backend cannot run the call, or None."""
        ...

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute the call."""
        ...


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "tiled": tiled,
    "triton": triton,
    "gluon": gluon,
    "gluon_fp8": gluon_fp8,
    "cpu": cpu,
    "sdpa": sdpa,
}


# Backends that `auto` takes only where they were measured to win, though they can do more.
AUTO_LIMITS: dict[str, Callable[[AttentionCall], str | None]] = {"gluon": gluon.unmeasured}


def load(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}.")
    return BACKENDS[name]


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
        if candidate.refusal(call) is None and _passed_over(name, call) is None:
            return candidate
    raise AssertionError("the last backend of AUTO_ORDER runs every call")


def _passed_over(name: str, call: AttentionCall) -> str | None:
    """Why `auto` does not take a backend that could run the call, or None."""
    limit = AUTO_LIMITS.get(name)
    return None if limit is None else limit(call)


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
        elif (limit := _passed_over(name, call)) is not None:
            verdict = f"able, but {limit}"
        elif taken:
            verdict = "able, slower here"
        else:
            verdict, taken = "chosen", True
        lines.append((name, verdict))
    return lines
