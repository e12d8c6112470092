"""What is computed with a packed weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.ops.attention.watch import is_watched
from saccade.ops.linear import forward, native, operator
from saccade.ops.linear.packed import BLOCK_ROWS, PackedWeight
from saccade.ops.planning import planning

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x `[.., in]` times the transposed weight, plus bias `[out]` -> `[.., out]` in x's dtype.

    Sums are float32; many rows of x, and the weight with them, may be rounded to bfloat16 first.
    """
    return linears(x, [weight], [bias])[0]


def linears(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`linear` of several weights with the same input, threads woken once (q, k and v)."""
    biases = [None] * len(weights) if biases is None else biases
    outs = _products(x, weights, biases, "none")
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def gated(x: Tensor, gate: PackedWeight, up: PackedWeight, activation: str) -> Tensor:
    """activation(gate x) * up x -> `[.., out]`: the first half of a gated MLP.

    Args:
        activation: "silu", or "gelu_tanh" (the approximation by tanh).
    """
    if activation not in ("silu", "gelu_tanh") or gate.shape != up.shape:
        raise ValueError(
            'gated needs "silu" or "gelu_tanh" and two weights of one shape, '
            f"got {activation!r}, {list(gate.shape)} and {list(up.shape)}."
        )
    out = _products(x, [gate, up], [None, None], activation)[0]
    return out.view(*x.shape[:-1], out.shape[1])


def rows(weight: PackedWeight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, by int64 index `[..]` -> `[.., in]` (an embedding)."""
    _check_dtype(dtype)
    shape = (*index.shape, weight.shape[1])
    flat = index.reshape(-1).long()
    if planning() or index.is_meta:
        return index.new_empty(shape, dtype=dtype)
    if not native.usable(weight):
        # Each row comes with its block of 16.
        parts = flat.split(forward.plain_at_once(weight.shape[1]) // BLOCK_ROWS)
        return torch.cat([_rows_by_torch(weight, part, dtype) for part in parts]).view(shape)
    read = operator.chosen_rows if is_watched((index,)) else operator.chosen_rows_now
    return read(flat.contiguous(), dtype, *operator.flatten(weight)).view(shape)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` as plain numbers."""
    _check_dtype(dtype)
    if not native.usable(weight) or is_watched(weight.parts):
        return forward.matrix(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    native.read_rows(weight, None, 0, out)
    return out


def _products(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], gate: str
) -> list[Tensor]:
    _check(x, weights, biases)
    flat = x.reshape(-1, x.shape[-1])
    if planning() or not (is_watched((x, *biases)) or _needs_gradients(x, biases)):
        return forward.run(flat, weights, biases, gate)
    pairs = zip(weights, biases, strict=True)
    apply = operator.product if is_watched((x, *biases)) else operator.Product.apply
    parts = [apply(flat, bias, *operator.flatten(weight)) for weight, bias in pairs]
    return forward.gated(parts, gate)


def _needs_gradients(x: Tensor, biases: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(bias is not None and bias.requires_grad for bias in biases)


def _rows_by_torch(weight: PackedWeight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of 16 rows that hold the rows, of which one each is kept."""
    block, row = index // BLOCK_ROWS, index % BLOCK_ROWS
    low = None if weight.minimum is None else weight.minimum[block]
    chosen = PackedWeight(
        (len(index) * BLOCK_ROWS, weight.shape[1]),
        weight.bits,
        weight.group,
        weight.qdata[block],
        weight.scale[block],
        low,
    )
    wide = forward.matrix(chosen, dtype).view(len(index), BLOCK_ROWS, weight.shape[1])
    return wide[torch.arange(len(index), device=index.device), row]


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"Packed weights give float32, bfloat16 or float16, not {dtype}.")


def _check(x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> None:
    _check_dtype(x.dtype)
    if len(biases) != len(weights):
        raise ValueError(f"{len(weights)} weights need as many biases, got {len(biases)}.")
    for weight, bias in zip(weights, biases, strict=True):
        if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"x must be [.., {weight.shape[1]}] for a weight of {list(weight.shape)}, "
                f"got {list(x.shape)}."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}.")
        if x.device != weight.device and not x.is_meta and not planning():
            raise ValueError(
                f"x is on {x.device}, the weight on {weight.device}: move one to the other."
            )
