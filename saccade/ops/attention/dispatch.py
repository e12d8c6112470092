"""Which backend computes a call: an explicit one never falls back, `auto` takes the first able.

The order is AUTO_ORDER, behind what a measured rule puts first on this kind of GPU (rules.py).

Adding a backend is one file with `refusal(call)` and `run(call)` and one line in BACKENDS.  A
backend's module is imported here, so it imports what is heavy (Triton) only to run.
"""

from __future__ import annotations

from typing import Protocol

from saccade.core import AttentionOutput, Unsupported
from saccade.ops.attention import reference, rules, tiled
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu import backend as cpu
from saccade.ops.attention.nvidia import gluon_backend as gluon
from saccade.ops.attention.nvidia import gluon_fp8_backend as gluon_fp8
from saccade.ops.attention.nvidia import triton_backend as triton
from saccade.ops.attention.nvidia.gluon.decode import support as gluon_decode
from saccade.ops.attention.nvidia.gluon.quantized_decode import support as gluon_codes
from saccade.ops.attention.sdpa import backend as sdpa

# Fastest first, by measurement (benchmarks/results); the last one runs everything in O(N) memory.
AUTO_ORDER = ("gluon", "triton", "cpu", "sdpa", "gluon_fp8", "tiled")


class Backend(Protocol):
    """What a backend module offers."""

    def refusal(self, call: AttentionCall) -> str | None:
        """Why this backend cannot run the call, or None."""
        ...

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute the call."""
        ...


class Measurer(Protocol):
    """What a module offers whose kernel was measured on calls that no rule describes."""

    def unmeasured(self, call: AttentionCall) -> str | None:
        """Why `auto` leaves a call to others, or None."""
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


# Backends that `auto` takes only where a rule names them, though they can do more.
ONLY_MEASURED = ("gluon",)


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
    rule = rules.preferred(call)
    for name in _asked(rule):
        candidate = load(name)
        if candidate.refusal(call) is None and not _passed_over(name, rule, call):
            return candidate
    raise AssertionError("the last backend of AUTO_ORDER runs every call")


def _asked(rule: rules.Rule | None) -> tuple[str, ...]:
    """Backends in the order in which `auto` asks them."""
    first = () if rule is None else rule.order
    return (*first, *(name for name in AUTO_ORDER if name not in first))


def _passed_over(name: str, rule: rules.Rule | None, call: AttentionCall) -> bool:
    """Whether `auto` leaves out a backend that could run the call."""
    if name not in ONLY_MEASURED:
        return False
    measurer = _measurer(call)
    if measurer is not None:
        return measurer.unmeasured(call) is not None
    return rule is None or name not in rule.order


def _unmeasured(name: str, call: AttentionCall) -> str:
    """Why `_passed_over` says so."""
    measurer = _measurer(call)
    reason = None if measurer is None else measurer.unmeasured(call)
    return reason or rules.unmeasured(name, call)


def _measurer(call: AttentionCall) -> Measurer | None:
    """Who measured calls like this one; rules are about many queries over plain keys alone."""
    if gluon_codes.reads(call.kv):
        return gluon_codes
    return gluon_decode if gluon_decode.reads(call) else None


def _chosen(name: str, rule: rules.Rule | None) -> str:
    """The verdict for the backend that `auto` takes, with the measurement where one decided."""
    if rule is None or name not in rule.order:
        return "chosen"
    return f"chosen: {rule.why} ({rule.source})"


def explain(call: AttentionCall) -> list[tuple[str, str]]:
    """(backend, verdict) for each backend, in the order `auto` asks them."""
    lines: list[tuple[str, str]] = []
    rule = rules.preferred(call)
    asked, taken = _asked(rule), False
    for name in (*asked, *(n for n in BACKENDS if n not in asked)):
        reason = load(name).refusal(call)
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif name not in asked:
            verdict = "able, but only by name: it materialises the scores"
        elif _passed_over(name, rule, call):
            verdict = f"able, but {_unmeasured(name, call)}"
        elif taken:
            verdict = "able, slower here"
        else:
            verdict, taken = _chosen(name, rule), True
        lines.append((name, verdict))
    return lines
