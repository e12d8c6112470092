"""How products with packed weights are computed.

Few rows of x: by kernels that read the packed weights once and keep all of x's digits.  Many rows:
by kernels that multiply bfloat16, where the CPU does (but for AMX); elsewhere a part of the weight at a time
becomes a plain matrix in a small buffer, and PyTorch multiplies it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from saccade.ops.attention.cpu.binding import extension, target
from saccade.ops.linear import native
from saccade.ops.linear.packed import PackedWeight, unpack
from saccade.ops.planning import counting, note_workspace, planning

FEW_ROWS = 32
_TILE_BYTES = 4 << 20


class _Buffers(threading.local):
    """A part of a weight, kept by each thread for its next call."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def run(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], gate: str
) -> list[Tensor]:
    """The products of x `[rows, in]` with each weight; with a gate the one product of two."""
    outs = [
        x.new_empty(x.shape[0], weight.shape[0])
        for weight in (weights if gate == "none" else weights[:1])
    ]
    if planning() or x.is_meta:
        if counting():
            note_workspace(workspace_bytes(x, weights[0]))
        return outs
    if not all(map(native.usable, weights)):
        return gated([_plain(x, *pair) for pair in zip(weights, biases, strict=True)], gate)
    if x.shape[0] <= FEW_ROWS or multiplies_bfloat16():
        native.products(_in_rows(x), weights, biases, outs, gate, _scratch(x))
        return outs
    return gated([_by_tiles(x, *pair) for pair in zip(weights, biases, strict=True)], gate)


def workspace_bytes(x: Tensor, weight: PackedWeight) -> int:
    """What a product takes beside its output: copies of x, and a part of the weight."""
    rows, width = x.shape
    if rows <= FEW_ROWS:
        return rows * width * 9
    return rows * width * 2 + min(weight.shape[0] * width * 4, max(_TILE_BYTES, 64 * width * 4))


def plain_rows(weight: PackedWeight, first: int, n: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `first + n` as plain numbers, in a buffer that the next call overwrites."""
    size = n * weight.shape[1]
    buffer = _buffers.of.get(dtype)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers.of[dtype] = torch.empty(size, dtype=dtype)
    out = buffer[:size].view(n, weight.shape[1])
    native.read_rows(weight, None, first, out)
    return out


def tiles(weight: PackedWeight, dtype: torch.dtype) -> list[tuple[int, int]]:
    """(first row, rows) of the parts of a weight that fit the buffer."""
    out, width = weight.shape
    step = max(64, _TILE_BYTES // (dtype.itemsize * max(width, 1)) // 64 * 64)
    return [(first, min(step, out - first)) for first in range(0, out, step)]


def matrix(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` as plain numbers, by PyTorch alone."""
    q, scale, low = unpack(weight)
    wide = q.unflatten(1, (scale.shape[1], weight.group)) * scale.float().unsqueeze(-1)
    if low is not None:
        wide = wide + low.float().unsqueeze(-1)
    return wide.view(weight.shape).to(dtype)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the kernels have products of many rows."""
    return product_dtype() is torch.bfloat16 and "amx" not in _target_name()


def _target_name() -> str:
    kernels = extension()
    return target() or ("" if kernels is None else kernels.targets()[0])


@cache
def product_dtype() -> torch.dtype:
    """What PyTorch multiplies fastest on this CPU: bfloat16 where it has instructions for it."""
    fast = "bf16" in _target_name() or "amx" in _target_name()
    return torch.bfloat16 if fast else torch.float32


def _plain(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, matrix(weight, x.dtype), bias)


def _by_tiles(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    dtype = product_dtype()
    wide, out = x.to(dtype), x.new_empty(x.shape[0], weight.shape[0])
    for first, n in tiles(weight, dtype):
        part = torch.nn.functional.linear(wide, plain_rows(weight, first, n, dtype))
        out[:, first : first + n] = part
    return out if bias is None else out.add_(bias)


def gated(parts: list[Tensor], gate: str) -> list[Tensor]:
    """The products themselves, or the one of gate and up."""
    if gate == "none":
        return parts
    first, second = parts
    if gate == "silu":
        return [torch.nn.functional.silu(first) * second]
    return [torch.nn.functional.gelu(first, approximate="tanh") * second]


def _scratch(x: Tensor) -> Tensor | None:
    """Room for many rows in bfloat16, filled up to strips of 12."""
    if x.shape[0] <= FEW_ROWS:
        return None
    return torch.empty(-(-x.shape[0] // 12) * 12, x.shape[1], dtype=torch.bfloat16)


def _in_rows(x: Tensor) -> Tensor:
    """x with a unit stride in its rows."""
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()
