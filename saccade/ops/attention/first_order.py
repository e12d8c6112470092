"""Gradients that must not be differentiated again: their own gradient is an error, not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core import Unsupported


class FirstOrder(torch.autograd.Function):
    """A gradient as it is; `sources` are the tensors that a second derivative would go to."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is needed backwards."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        raise Unsupported(
            "this backend's gradients cannot be differentiated again: its kernels compute first "
            'derivatives only. Use backend="tiled" for second ones.'
        )


def first_order(x: Tensor) -> Tensor:
    """`x`, whose gradient cannot be differentiated again."""
    if not x.requires_grad:
        return x
    y = x.view_as(x)
    y.register_hook(lambda g: FirstOrder.apply(g, x) if torch.is_grad_enabled() else g)
    return y
