"""Batch-1 linear layers and norms of a decoding step, fused so that weights are read once.

A step of batch 1 is bound by reading weights.  Matrix libraries divide a matrix-vector product as
they would a large matrix product, and each of a layer's seven is one launch or two, with idle
memory at the start and end of each.  Here linear layers with the same input are one launch, the
gate of an MLP is applied where it is computed, and a residual addition and the norm behind it are
one launch.
Sums are float32, results are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu.support import architecture, has_triton
from saccade.ops.tuning.gemv import launches

MAX_ROWS = 256  # of a norm: the heads of one token


def supports(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take a row `x` `[1, .., 1, K]` and matrices `[N, K]`, without gradient.

    Only on architectures where they were measured (`tuning/measured/gemv`).
    """
    if x.numel() != x.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (
        _measured_on(x.device)
        and all(
            type(weight.data) is Tensor  # not one of a quantizing library
            and weight.is_contiguous()
            and (weight.dtype, weight.device) == (x.dtype, x.device)
            and weight.shape[1:] == x.shape[-1:]
            for weight in weights
        )
    )


def supports_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes rows `[.., K]`, at most MAX_ROWS of them, without gradient."""
    few = 0 < x.numel() <= MAX_ROWS * x.shape[-1]
    plain = weight.dtype == x.dtype and not torch.is_grad_enabled()
    return few and plain and not torch.compiler.is_compiling() and _measured_on(x.device)


def _measured_on(device: torch.device) -> bool:
    return has_triton(device) and launches(architecture(device)) is not None


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """One to three linear layers `[N, K]` of a row `[.., K]`, with biases -> `[.., N]` each."""
    from saccade.ops.gemv import kernel

    found = kernel.linears(x.reshape(-1), weights, biases)
    return [y.view(*x.shape[:-1], -1) for y in found]


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate x) * (up x) of a row `[.., K]` and two matrices `[N, K]` -> `[.., N]`."""
    from saccade.ops.gemv import kernel

    return kernel.gated_mlp(x.reshape(-1), gate, up).view(*x.shape[:-1], -1)


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a + b and its RMS norm, rows `[.., K]`; the norm is of the rounded sum."""
    from saccade.ops.gemv import kernel

    return kernel.add_rms_norm(a.contiguous(), b.contiguous(), weight, eps, 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm of rows `[.., K]`, times weight + offset."""
    from saccade.ops.gemv import kernel

    return kernel.add_rms_norm(x.contiguous(), None, weight, eps, offset)[1]
