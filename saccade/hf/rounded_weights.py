"""Matrices rounded to int8 or int4, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from saccade.hf.packed_layers import StoredWeight, tensors_of
from saccade.ops.linear import quantized
from saccade.runtime.placement import Form
from saccade.runtime.weights import stored_as

_AT_ONCE: Final = 2**23
"""Numbers that are plain at a time."""
_ROWS: Final = 64
"""Packed weights order numbers within blocks of rows, of which this is a multiple."""

Rows = Callable[[int, int], Tensor]
"""Some rows of a matrix as plain numbers: from, to."""


def rounded(rows: Rows, shape: tuple[int, int], form: Form, outer: bool) -> StoredWeight | None:
    """A matrix `[out, in]` rounded to int8 or int4; None where its rows are no whole groups.

    Args:
        outer: of the embedding or the output head, which cost most when they are rounded.
    """
    out, width = shape
    stored = stored_as("F32", width, form, torch.float32, outer=outer)
    if isinstance(stored, torch.dtype):
        return None
    bits = stored.bits
    step = max(_ROWS, _AT_ONCE // width // _ROWS * _ROWS)
    if step >= out:
        return quantized(rows(0, out), bits)
    first = quantized(rows(0, step), bits)
    whole = {
        name: tensor.new_empty(-(-out * tensor.shape[0] // step), *tensor.shape[1:])
        for name, tensor in tensors_of(first).items()
    }
    for at in range(0, out, step):
        part = quantized(rows(at, min(at + step, out)), bits) if at else first
        for name, tensor in tensors_of(part).items():
            start = at // step * tensors_of(first)[name].shape[0]
            whole[name][start : start + tensor.shape[0]] = tensor
    return replace(first, shape=shape, **whole)  # type: ignore[arg-type]
