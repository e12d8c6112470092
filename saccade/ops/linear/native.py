"""Calls of the C++ kernels of packed weights: csrc/linear_binding.cpp checks all of it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from saccade.ops.attention.cpu.binding import BUILT, extension, record, target
from saccade.ops.linear.packed import PackedWeight

GATES = {"none": 0, "silu": 1, "gelu_tanh": 2}
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F32", "BF16", "F16")

_Record: TypeAlias = tuple[object, ...]


def usable(weight: PackedWeight) -> bool:
    """Whether the kernels can read a weight."""
    return BUILT and weight.qdata.is_cpu and extension() is not None


def products(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    gate: str = "none",
    scratch: Tensor | None = None,
) -> None:
    """x `[rows, in]` times each weight, plus its bias, into its out `[rows, out]`.

    Args:
        scratch: for many rows, where the target multiplies bfloat16: room for x in that dtype.
    """
    _kernels().linear(
        record(x),
        tuple(map(_record, weights)),
        tuple(None if bias is None else record(bias) for bias in biases),
        tuple(map(record, outs)),
        None if scratch is None else record(scratch),
        GATES[gate],
        torch.get_num_threads(),
        target(),
    )


def read_rows(weight: PackedWeight, index: Tensor | None, first: int, out: Tensor) -> None:
    """Rows `index` of a weight, or those from `first` on, into out `[n, in]`."""
    chosen = None if index is None else record(index)
    threads = torch.get_num_threads()
    _kernels().read_rows(_record(weight), chosen, first, record(out), threads, target())


def fill(weight: PackedWeight, kind: str, raw: Tensor) -> bool:
    """Packs raw bytes `[out, bytes]` of a kind; False where a scale leaves float16's range."""
    threads = torch.get_num_threads()
    code = KINDS.index(kind)
    return _kernels().pack_weight(code, record(raw), _record(weight), threads, target())


def _kernels():
    kernels = extension()
    assert kernels is not None
    return kernels


def _record(weight: PackedWeight) -> _Record:
    low = None if weight.minimum is None else record(weight.minimum)
    parts = record(weight.qdata), record(weight.scale), low
    return *parts, *weight.shape, weight.group, weight.bits
