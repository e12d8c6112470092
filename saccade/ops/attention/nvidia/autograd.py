"""The dense kernels as operators of torch.library: autograd, torch.compile and opcheck know them.

The way through torch.library costs the host several times what the kernels of a short row take the
card.  So where nobody has to see an operator, in eager runs without a mode of PyTorch that watches
operators, the same functions run as a plain `torch.autograd.Function`.

An operator takes tensors and plain numbers, so a Problem is passed flat, in the order of its
fields; a window or softcap of None travels as 0.  Which kernels an operator runs is decided when it
runs (`gluon/training.py`); under `torch.use_deterministic_algorithms(True)` gradients are the same
bits every time.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._python_dispatch import (  # no public way to ask
    _get_current_dispatch_mode,  # type: ignore[attr-defined]
)

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia import training as gluon_training
from saccade.ops.attention.nvidia.problem import Problem

_NUMBERS = ("window", "softcap")
_FIELDS = [field.name for field in fields(Problem)]
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? slopes, Tensor? padding, "
    "Tensor? kv_lens, Tensor? offsets, Tensor? cu_q, Tensor? cu_k, Tensor? allowed, "
    "Tensor? foreign, bool causal, SymInt window, SymInt sinks, float scale, float softcap, "
    "SymInt q_offset, SymInt q_block, SymInt k_block, SymInt num_keys"
)


def attend(problem: Problem) -> AttentionOutput:
    """Attention with gradients for q, k, v and sink_logits."""
    flat = flatten(problem)
    run = _forward if is_watched(flat) else _Eager.apply
    return AttentionOutput(*run(*flat))


def is_watched(flat: tuple[Any, ...]) -> bool:
    """Whether somebody has to see an operator: a compiler, a mode, tensors that are not plain."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, Parameter) for x in flat)


def flatten(problem: Problem) -> tuple[Any, ...]:
    """The arguments of the operator."""
    flat = {name: getattr(problem, name) for name in _FIELDS}
    return tuple((flat | {name: flat[name] or 0 for name in _NUMBERS}).values())


def operator() -> Any:
    """The operator `saccade::attend`, for torch.library's checks."""
    return _forward


def _problem(flat: tuple[Any, ...]) -> Problem:
    named = dict(zip(_FIELDS, flat, strict=True))
    for name in _NUMBERS:
        named[name] = named[name] or None
    return Problem(**named)


@torch.library.custom_op(
    "saccade::attend", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)"
)
def _forward(*flat: Any) -> tuple[Tensor, Tensor]:
    return tuple(gluon_training.forward(_problem(flat)))  # type: ignore[return-value]


@_forward.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    q, v = flat[0], flat[2]
    shape = q.shape[:3]
    return q.new_empty(*shape, v.shape[3]), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "saccade::attend_backward",
    mutates_args=(),
    schema=f"(Tensor out, Tensor lse, Tensor dout, Tensor dlse, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, *flat: Any) -> Any:
    return gluon_training.backward(_problem(flat), out, lse, dout, dlse)


@_backward.register_fake
def _(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, *flat: Any) -> Any:
    grads = [x.new_empty(x.shape) for x in flat[:3]]
    return (*grads, torch.empty_like(lse))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.flat = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.held = [isinstance(x, Tensor) for x in inputs]


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    return _gradients_by(_backward, ctx, dout, dlse)


def _gradients_by(run: Any, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    left = iter(tensors)
    flat = [next(left) if held else x for held, x in zip(ctx.held, ctx.flat, strict=True)]
    dq, dk, dv, delta = run(out, lse, dout, dlse, *flat)
    sink = flat[3]
    dsink = None
    if sink is not None:
        # The sink has a weight exp(sink - lse) and no value: its score gradient is -weight * delta.
        weight = (sink.float()[None, :, None] - lse).exp().nan_to_num(0.0)
        dsink = -(weight * delta).sum((0, 2)).to(sink.dtype)
    return (dq, dk, dv, dsink, *[None] * (len(flat) - 4))


_forward.register_autograd(_gradients, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The operator as autograd alone knows it."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return tuple(gluon_training.forward(_problem(flat)))  # type: ignore[return-value]

    setup_context = staticmethod(_keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        def run(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, *flat: Any) -> Any:
            return gluon_training.backward(_problem(flat), out, lse, dout, dlse)

        return _gradients_by(run, ctx, dout, dlse)
