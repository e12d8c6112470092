"""Products with a packed weight as operators of torch.library, for autograd and torch.compile.

As with attention, an eager call that nobody watches runs the same functions as a plain
`torch.autograd.Function`, or without one where nothing needs gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.linear import forward, native
from saccade.ops.linear.packed import PackedWeight

_WEIGHT = (
    "Tensor qdata, Tensor scale, Tensor? minimum, SymInt out, SymInt width, int bits, int group"
)


def flatten(weight: PackedWeight) -> tuple[Any, ...]:
    """A weight as arguments of the operators."""
    parts = weight.qdata, weight.scale, weight.minimum
    return *parts, *weight.shape, weight.bits, weight.group


def _weight_of(flat: tuple[Any, ...]) -> PackedWeight:
    qdata, scale, minimum, out, width, bits, group = flat
    return PackedWeight((out, width), bits, group, qdata, scale, minimum)


def _product(x: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    return forward.run(x, [_weight_of(flat)], [bias], "none")[0]


def _input_gradient(grad: Tensor, *flat: Any) -> Tensor:
    """grad `[rows, out]` times the weight, a part of it at a time."""
    weight = _weight_of(flat)
    if not native.usable(weight):
        return grad @ forward.matrix(weight, grad.dtype)
    dx = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=torch.float32)
    buffer = forward.tile_buffer([weight], torch.float32)
    for first, n in forward.tiles(weight.shape, torch.float32):
        part = grad[:, first : first + n].float()
        dx.addmm_(part, forward.plain_rows(weight, first, n, buffer))
    return dx.to(grad.dtype)


def chosen_rows_now(index: Tensor, dtype: torch.dtype, *flat: Any) -> Tensor:
    """Rows of a weight on the CPU, by index `[n]` -> `[n, in]`."""
    weight = _weight_of(flat)
    out = torch.empty(index.shape[0], weight.shape[1], dtype=dtype)
    native.read_rows(weight, index, 0, out)
    return out


product = torch.library.custom_op(
    "saccade::packed_linear",
    _product,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor",
)
input_gradient = torch.library.custom_op(
    "saccade::packed_linear_backward",
    _input_gradient,
    mutates_args=(),
    schema=f"(Tensor grad, {_WEIGHT}) -> Tensor",
)
chosen_rows = torch.library.custom_op(
    "saccade::packed_rows",
    chosen_rows_now,
    mutates_args=(),
    schema=f"(Tensor index, ScalarType dtype, {_WEIGHT}) -> Tensor",
)


@product.register_fake
def _(x: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    return x.new_empty(x.shape[0], flat[3])


@input_gradient.register_fake
def _(grad: Tensor, *flat: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], flat[4])


@chosen_rows.register_fake
def _(index: Tensor, dtype: torch.dtype, *flat: Any) -> Tensor:
    return index.new_empty(index.shape[0], flat[4], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *flat = inputs
    ctx.save_for_backward(*flat[:3])
    ctx.sizes = flat[3:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    (grad,) = grads
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(grad, *ctx.saved_tensors, *ctx.sizes)
    if ctx.needs_input_grad[1]:
        dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dbias, *[None] * 7


product.register_autograd(_gradients, setup_context=_save)


class Product(torch.autograd.Function):
    """`product` without the dispatch of torch.library."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        return _product(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)
