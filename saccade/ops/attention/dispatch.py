"""Which backend computes a call: a named one never falls back, `auto` takes the first that can.

`auto` tries what a measured rule puts first on this machine (rules.py), then AUTO_ORDER.  This is
the only place where that is decided; the chosen backend runs its own kernels and no other's.

Adding a backend is one module with `refusal(call)` and `run(call)` and one line in BACKENDS; with
`forward` and `backward` it is differentiable too.  A backend's module is imported here, so it
imports what is heavy (Triton) only to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from saccade.core import AttentionOutput, Unsupported
from saccade.ops.attention import reference, rules, tiled, watch
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu import backend as cpu
from saccade.ops.attention.known import NO_OTHERS, Known, is_disturbed
from saccade.ops.attention.nvidia import (
    gluon_backend,
    gluon_fp8_backend,
    gluon_triton_backend,
    triton_backend,
)
from saccade.ops.attention.peers import fa3, fa4, flash_attn, flashinfer
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.gpu.replay import Replay, is_hooked
from saccade.ops.planning import planning

# Fastest first, by measurement (benchmarks/results); the last one runs everything in O(N) memory.
AUTO_ORDER = (
    "gluon", "gluon_triton", "triton", "cpu", "sdpa", "gluon_fp8",
    "fa3", "fa4", "flash_attn", "flashinfer", "tiled",
)  # fmt: skip

# Packages of others, which need not be installed: each is imported at the first call it could take.
PEERS = ("fa3", "fa4", "flash_attn", "flashinfer")

# Backends that `auto` takes only where a rule names them, though they can do more.
ONLY_MEASURED = ("gluon", "gluon_triton", *PEERS)


class Backend(Protocol):
    """What a backend module offers."""

    def refusal(self, call: AttentionCall) -> str | None:
        """Why this backend cannot run the call, or None."""
        ...

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute a call that `refusal` accepts."""
        ...


@runtime_checkable
class Forward(Protocol):
    """What a backend offers that can run inside the operator, over plain dense keys."""

    def forward(self, call: AttentionCall) -> AttentionOutput:
        """Output and lse of a call, both always filled and contiguous."""
        ...


@runtime_checkable
class Differentiable(Forward, Protocol):
    """What a backend offers besides whose gradients are kernels of its own."""

    def backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, dv, delta), delta being rowsum(dout * out) - dlse, float32 `[B, H, Lq]`."""
        ...


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "tiled": tiled,
    "triton": triton_backend,
    "gluon": gluon_backend,
    "gluon_triton": gluon_triton_backend,
    "gluon_fp8": gluon_fp8_backend,
    "cpu": cpu,
    "sdpa": sdpa,
    "fa3": fa3,
    "fa4": fa4,
    "flash_attn": flash_attn,
    "flashinfer": flashinfer,
}


_NAMES: dict[Backend, str] = {backend: name for name, backend in BACKENDS.items()}

# Backends of PyTorch's operators alone, each of which has a forward-mode derivative.
FORWARD_MODE = ("reference", "tiled")

# Backends whose kernels read and write memory behind PyTorch's back.
NATIVE = ("triton", "gluon", "gluon_triton", "gluon_fp8", "cpu", *PEERS)


# Backends that transform queries and outputs of Hadamard-transformed views themselves.
TRANSFORMING = ("cpu",)


def load(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        ValueError: no such backend.
    """
    if not isinstance(name, str) or name not in BACKENDS:  # pyright: ignore[reportUnnecessaryIsInstance]
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}.")
    return BACKENDS[name]


def refusal(call: AttentionCall, name: str) -> str | None:
    """Why a backend cannot run the call, or None."""
    if name not in FORWARD_MODE and call.has_tangents:
        return "it has no forward-mode gradients (torch.func.jvp)"
    return load(name).refusal(call) or _hidden(call, name)


def _hidden(call: AttentionCall, name: str) -> str | None:
    """Why native kernels cannot run where an operator has to be visible, or None."""
    if name not in NATIVE or planning() or not watch.is_intercepted(call.floats):
        return None
    if any(map(watch.is_transformed, call.floats)):
        return "torch.func transforms tensors that its kernels cannot see"
    if is_operator(call) and hasattr(load(name), "backward"):
        return None
    return "a tracer, dispatch mode or tensor subclass is active, which cannot see its kernels here"


def is_operator(call: AttentionCall) -> bool:
    """Whether the call fits the operator `saccade::attention`: plain dense keys without scales."""
    return call.is_plain_storage and call.q_scale is None


def choose(call: AttentionCall, name: str) -> Backend:
    """The backend that will run the call.

    Raises:
        ValueError: no such backend.
        Unsupported: the named backend cannot run this call.
    """
    return load(_auto(call) if name == "auto" else _named(call, name))


def remembered(call: AttentionCall, name: object) -> Backend | None:
    """The backend that ran a call of this signature in the same circumstances, or None.

    None too where gradients are needed or something watches: those calls are always worked out.
    """
    known = call.known
    if known is None or type(name) is not str or (known.learns and torch.is_grad_enabled()):
        return None
    return None if is_disturbed() else known.backends.get(_circumstances(call, name))


def repeated(
    known: Known, q: Tensor, name: object, others: tuple[object, ...]
) -> Callable[[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]] | None:
    """The recorded launches of a call of plain tensors alone, which nothing watches, or None.

    Args:
        others: as in `known.signature_of`.
    """
    if not q.is_cuda or others is not NO_OTHERS or type(name) is not str:
        return None
    if known.learns and torch.is_grad_enabled():
        return None
    chosen: Backend | None = known.backends.get(_gpu_circumstances(name))
    prepared = None if chosen is None else known.prepared.get(_NAMES[chosen])
    return prepared if isinstance(prepared, Replay) and not is_hooked() else None


def remember(call: AttentionCall, name: str, chosen: Backend) -> None:
    """Note which backend runs the calls of a signature, without gradients."""
    known = call.known
    if known is not None and not call.needs_grad and not is_disturbed():
        known.backends[_circumstances(call, name)] = chosen


def _circumstances(call: AttentionCall, name: str) -> tuple[object, ...]:
    """What the choice depends on beside the signature."""
    return (name, torch.get_num_threads()) if call.q.is_cpu else _gpu_circumstances(name)


def _gpu_circumstances(name: str) -> tuple[object, ...]:
    c = torch._C
    flash, efficient = c._get_flash_sdp_enabled(), c._get_mem_efficient_sdp_enabled()
    return name, flash, efficient, c._get_cudnn_sdp_enabled()


def transforms(call: AttentionCall, name: str) -> bool:
    """Whether the backend of a call transforms its queries and outputs itself."""
    if not call.q.is_cpu or call.needs_grad or torch.compiler.is_compiling():
        return False
    return (_auto(call) if name == "auto" else name) in TRANSFORMING


def differentiable(call: AttentionCall, name: str) -> Differentiable:
    """The backend for a call inside an operator; "auto" means the first that has gradients."""
    chosen = load(_auto(call, _DIFFERENTIABLE) if name == "auto" else name)
    assert isinstance(chosen, Differentiable), "the call was checked before it became an operator"
    return chosen


def forward(call: AttentionCall, name: str) -> AttentionOutput:
    """Output and lse of a call inside an operator; without gradients "auto" means any backend."""
    if name == "auto" and not call.needs_grad:
        chosen = load(_auto(call, _FORWARD))
        assert isinstance(chosen, Forward), "_FORWARD lists those that have it"
        return chosen.forward(call)
    return differentiable(call, name).forward(call)


_FORWARD = tuple(name for name, backend in BACKENDS.items() if isinstance(backend, Forward))
_DIFFERENTIABLE = tuple(n for n in _FORWARD if isinstance(BACKENDS[n], Differentiable))


def _named(call: AttentionCall, name: str) -> str:
    reason = refusal(call, name)
    if reason is not None:
        raise Unsupported(
            f'attention(backend="{name}") cannot run this call: {reason}. '
            'Use backend="auto" or "tiled".'
        )
    return name


def _auto(call: AttentionCall, among: tuple[str, ...] = AUTO_ORDER) -> str:
    deciding = not torch.compiler.is_compiling() and rules.may_decide(call)
    rule = preferred(call) if deciding else None
    for name in _order(rule):
        taken = name in among and not _passed_over(name, rule)
        if taken and refusal(call, name) is None:
            return name
    raise AssertionError("the last backend of AUTO_ORDER runs every call")


def preferred(call: AttentionCall) -> rules.Rule | None:
    """The first rule that fits the call; inside torch.compile none, which would add guards.

    Rules that begin with a peer come first, and hold where that peer can run the call.
    """
    if torch.compiler.is_compiling():
        return None
    found = rules.rules_for(call.q.device)
    fitting = found.fitting(rules.facts_of(call)) if found.rules else ()
    for rule in fitting:
        if rule.order[0] in PEERS and refusal(call, rule.order[0]) is None:
            return rule
    for rule in fitting:
        if rule.order[0] in PEERS:
            continue
        if not rule.kernel or sdpa.kernel_of(call) == rule.kernel:
            return rule
    return None


def _order(rule: rules.Rule | None) -> tuple[str, ...]:
    """Backends in the order in which `auto` tries them."""
    first = () if rule is None else tuple(name for name in rule.order if name in AUTO_ORDER)
    return (*first, *(name for name in AUTO_ORDER if name not in first))


def _passed_over(name: str, rule: rules.Rule | None) -> bool:
    """Whether `auto` leaves out a backend that could run the call."""
    return name in ONLY_MEASURED and (rule is None or name not in rule.order)


def explain(call: AttentionCall) -> list[tuple[str, str]]:
    """(backend, verdict) for each backend, in the order in which `auto` tries them."""
    lines: list[tuple[str, str]] = []
    rule = preferred(call)
    order, taken = _order(rule), False
    for name in (*order, *(n for n in BACKENDS if n not in order)):
        reason = refusal(call, name)
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif name not in order:
            verdict = "supported, but only by name: it materializes the scores"
        elif _passed_over(name, rule):
            found = rules.rules_for(call.q.device)
            verdict = f"supported, but {found.unmeasured(name, rules.facts_of(call))}"
        elif taken:
            verdict = "supported, slower here"
        else:
            verdict, taken = _chosen(name, rule), True
        lines.append((name, verdict))
    return lines


def _chosen(name: str, rule: rules.Rule | None) -> str:
    """The verdict for the backend that `auto` takes, with the measurement where one decided."""
    if rule is None or name not in rule.order:
        return "chosen"
    return f"chosen: {rule.why} ({rule.cited})"
