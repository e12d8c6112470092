"""What a decoding step computes beside attention, for one row: products that read weights once.

A step of batch 1 is bound by reading weights.  Matrix libraries cut a product by one row as they
would a large one, and each of a layer's seven is a launch or two whose start and end leave memory
idle; here those with the same input are one launch, the gate is applied where it is computed, and
additions and norms go together.  Sums are float32, results are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu.support import INTERPRETED, has_triton

FEW = 256  # rows of a norm: heads of a token


def serves(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take a row `x` `[1, .., 1, K]` and matrices `[N, K]`, without gradient.

    Only on Hopper, where they were measured.
    """
    if x.numel() != x.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (
        _measured_on(x.device)
        and all(
            type(weight.data) is Tensor  # not one of a quantising library
            and weight.is_contiguous()
            and (weight.dtype, weight.device) == (x.dtype, x.device)
            and weight.shape[1:] == x.shape[-1:]
            for weight in weights
        )
    )


def _measured_on(device: torch.device) -> bool:
    if device.type != "cuda":
        return INTERPRETED and has_triton(device)
    return has_triton(device) and torch.cuda.get_device_capability(device)[0] == 9


def products(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """One to three matrices `[N, K]` times a row `[.., K]`, plus biases -> `[.., N]` each."""
    from saccade.ops.gemv import kernel

    found = kernel.products(x.reshape(-1), weights, biases)
    return [y.view(*x.shape[:-1], -1) for y in found]


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate x) * (up x) of a row `[.., K]` and two matrices `[N, K]` -> `[.., N]`."""
    from saccade.ops.gemv import kernel

    return kernel.gated(x.reshape(-1), gate, up).view(*x.shape[:-1], -1)


def sum_and_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a + b and its RMS norm, rows `[.., K]`; the norm is of the rounded sum."""
    from saccade.ops.gemv import kernel

    return kernel.sum_and_norm(a.contiguous(), b.contiguous(), weight, eps, 0.0)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm of rows `[.., K]`, times weight + offset."""
    from saccade.ops.gemv import kernel

    return kernel.sum_and_norm(x.contiguous(), None, weight, eps, offset)[1]


def norm_served(x: Tensor, weight: Tensor) -> bool:
    """Whether `norm` takes rows `[.., K]`, as many as a step has heads, without gradient."""
    few = 0 < x.numel() <= FEW * x.shape[-1]
    plain = weight.dtype == x.dtype and not torch.is_grad_enabled()
    return few and plain and not torch.compiler.is_compiling() and _measured_on(x.device)
