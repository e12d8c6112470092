"""What is computed with a packed weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.ops.linear.packed import PackedWeight


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x `[.., in]` times the transposed weight, plus bias `[out]` -> `[.., out]` in x's dtype.

    Sums are float32; x may be rounded to bfloat16 first.
    """
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def linears(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`linear` of several weights with the same input, threads woken once (q, k and v)."""
    pairs = zip(weights, biases or [None] * len(weights), strict=True)
    return [linear(x, weight, bias) for weight, bias in pairs]


def gated(x: Tensor, gate: PackedWeight, up: PackedWeight, activation: str) -> Tensor:
    """activation(gate x) * up x -> `[.., out]`: the first half of a gated MLP.

    Args:
        activation: "silu", or "gelu_tanh" (the approximation by tanh).
    """
    first, second = linears(x, [gate, up])
    if activation == "silu":
        return torch.nn.functional.silu(first) * second
    return torch.nn.functional.gelu(first, approximate="tanh") * second


def rows(weight: PackedWeight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, by int64 index `[..]` -> `[.., in]` (an embedding)."""
    return dequantize(weight, dtype)[index]


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` as plain numbers."""
    out, width = weight.shape
    if weight.bits == 4:
        q = torch.stack((weight.qdata & 15, weight.qdata >> 4), dim=-1).reshape(out, width).float()
    else:
        q = weight.qdata.view(torch.int8).float()
    if weight.bits == 4 and weight.minimum is None:
        q = q - 8
    q = q.view(out, -1, weight.group) * weight.scale.float().unsqueeze(-1)
    if weight.minimum is not None:
        q = q + weight.minimum.float().unsqueeze(-1)
    return q.view(out, width).to(dtype)
