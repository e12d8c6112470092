"""The same numbers at other strides: every way in which a tensor may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _columns_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _reversed_order(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _framed(x: Tensor, step: int) -> Tensor:
    """Inside of a larger tensor of NaN (or the largest number), every `step`-th channel."""
    *rows, length, dim = x.shape
    fill = float("nan") if x.is_floating_point() and x.itemsize > 1 else 1
    frame = torch.full((*rows, length + 3, step * dim + 5), fill).to(x.dtype)
    inside = frame[..., 1 : length + 1, 2 : 2 + step * dim : step]
    inside.copy_(x)
    return inside


def _single_sizes(x: Tensor) -> Tensor:
    """Strides of dimensions of size 1, which nobody may use, are huge or 0."""
    strides = list(x.contiguous().stride())
    for axis, size in enumerate(x.shape):
        if size == 1:
            strides[axis] = 2**40 if axis % 2 else 0
    return x.contiguous().as_strided(x.shape, strides)


SAME_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "columns_first": _columns_first,
    "by_token": _by_token,
    "reversed_order": _reversed_order,
    "framed": lambda x: _framed(x, 1),
    "every_second_channel": lambda x: _framed(x, 2),
    "single_sizes": _single_sizes,
}


def _expanded(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, 1).expand_as(x) if x.shape[axis] else x


def _overlapping(x: Tensor, last: int) -> Tensor:
    """Rows share memory with the rows after them."""
    strides = (3, 2, 4, last)[-x.ndim :]
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    source = x.contiguous().flatten()
    if source.numel() == 0:
        return x
    return source.repeat(reach // source.numel() + 1)[:reach].as_strided(x.shape, strides)


OTHER_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_batch": lambda x: _expanded(x, 0),
    "one_head": lambda x: _expanded(x, 1),
    "one_token": lambda x: _expanded(x, 2),
    "one_channel": lambda x: _expanded(x, 3),
    "overlapping": lambda x: _overlapping(x, 1),
    "overlapping_channels": lambda x: _overlapping(x, 2),
}
"""Layouts in which several elements share memory, so the numbers are others than those given."""

LAYOUTS = SAME_NUMBERS | OTHER_NUMBERS
