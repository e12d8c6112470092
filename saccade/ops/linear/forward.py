"""How products with packed weights are computed.

Few rows of x: by kernels that read the packed weights once and keep all of x's digits.  Many rows:
by kernels that multiply bfloat16, where the CPU does.  Elsewhere, and on AMX, a part of the weight
at a time becomes a plain matrix in a small buffer, and PyTorch multiplies it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from saccade.ops.attention.cpu.binding import extension, target
from saccade.ops.linear import native
from saccade.ops.linear.packed import BLOCK_ROWS, PackedWeight, unpack
from saccade.ops.planning import counting, note_workspace, planning

FEW_ROWS = 12  # above, products with bfloat16 are faster
_TILE_BYTES = 4 << 20
_PLAIN_NUMBERS = 1 << 24  # of a weight that are plain at once where there are no kernels
_STRIP = 12  # of csrc/linear.h
# Products of more rows run piece by piece, so that what they take besides does not grow with the
# text.  Pieces of about a thousand are no slower: their sums fit the cache that the panels lie in.
_MOST_ROWS = 86 * _STRIP
_PANEL_BYTES = 1024 * BLOCK_ROWS * 2  # kPart columns: csrc/linear_panels.h
_MOST_PAIRS = 4  # of panels of a work item: kPairs


class _Buffers(threading.local):
    """A part of a weight, kept by each thread for its next call."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def run(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], gate: str
) -> list[Tensor]:
    """The products of x `[rows, in]` with each weight; with a gate the one product of two."""
    if x.is_meta and not planning():
        return [_out(x, weight) for weight in (weights if gate == "none" else weights[:1])]
    usable = all(map(native.usable, weights))
    if usable and (x.shape[0] <= FEW_ROWS or multiplies_bfloat16()):
        return _by_kernels(x, weights, biases, gate)
    if usable:
        buffer = tile_buffer(weights, product_dtype())
        return gated(_by_tiles(x, weights, biases, buffer), gate)
    return gated([_plain(x, *pair) for pair in zip(weights, biases, strict=True)], gate)


def _by_kernels(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], gate: str
) -> list[Tensor]:
    """In a plan everything but the kernels runs."""
    outs = [_out(x, weight) for weight in (weights if gate == "none" else weights[:1])]
    x, rows = _in_rows(x), x.shape[0]
    few, step = rows <= FEW_ROWS, piece(rows)
    room = None if few else x.new_empty(step, x.shape[1], dtype=torch.bfloat16)
    if counting():
        sizes = [weight.shape[0] for weight in weights]
        note_workspace(workspace_bytes(rows, x.shape[1], sizes, gate))
    if planning():
        return outs
    if room is None:
        native.products(x, weights, biases, outs, gate)
        return outs
    for first in range(0, rows, step):
        part, into = x[first : first + step], [out[first : first + step] for out in outs]
        scratch = room[: -(-part.shape[0] // _STRIP) * _STRIP]
        native.products(part, weights, biases, into, gate, scratch)
    return outs


def piece(rows: int) -> int:
    """Rows that are multiplied by panels at once: whole strips, about equal pieces."""
    pieces = max(1, -(-rows // _MOST_ROWS))
    return -(-rows // (pieces * _STRIP)) * _STRIP


def product_bytes(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """Most bytes that a product allocates beside its output, and those that are kept after it.

    Args:
        shape: of the weight; dtype: of x; device: "cpu" or "cuda".
    """
    out, width = shape
    if device != "cpu" or not native.BUILT:
        part = min(-(-out // BLOCK_ROWS) * BLOCK_ROWS, plain_at_once(width))
        return plain_bytes(part, width) + (part < out) * rows * part * dtype.itemsize, 0
    if rows <= FEW_ROWS or multiplies_bfloat16():
        scratch = 0 if rows <= FEW_ROWS else piece(rows) * width * 2
        return scratch, workspace_bytes(rows, width, [out], "none")
    wide, part = product_dtype(), tiles(shape, product_dtype())[0][1]
    copy = 0 if dtype == wide else rows * width * wide.itemsize
    return copy + part * rows * wide.itemsize, part * width * wide.itemsize


def plain_bytes(rows: int, width: int) -> int:
    """Most bytes while some rows become plain: each number twice as float32, once as a byte."""
    return rows * width * 9


def workspace_bytes(rows: int, width: int, outs: Sequence[int], gate: str) -> int:
    """The most that the C++ kernels allocate by themselves for a product, on one set of threads.

    Calls leave torch's threads for saccade's own where those come late (csrc/pool.cpp), and each
    thread keeps what it took: on a busy machine both sets together may hold up to twice this.
    What PyTorch allocates (outputs, copies of x, parts of a weight) is not in it.

    Args:
        rows, width: of x; outs: rows of each weight.
    """
    if rows <= FEW_ROWS:  # place_inputs: x in float32 and twice in bfloat16, a sum of 16 numbers
        return _pages(sum(_aligned(rows * width * sixteen // 16) for sixteen in (64, 32, 32, 4)))
    blocks = [-(-out // BLOCK_ROWS) for out in outs]
    pairs = blocks[0] if gate != "none" else sum(-(-n // 2) for n in blocks)
    threads = torch.get_num_threads()
    per_item = max(1, min(_MOST_PAIRS, pairs // (2 * threads)))
    sums = piece(rows) * 2 * BLOCK_ROWS * 4
    an_item = _pages(min(per_item, pairs) * (2 * _aligned(_PANEL_BYTES) + _aligned(sums)))
    return min(threads, -(-pairs // per_item)) * an_item


def _aligned(n: int) -> int:
    """What csrc/arena.h takes for n bytes."""
    return -(-n // 64) * 64 + 64


def _pages(n: int) -> int:
    """What csrc/workspace.h allocates for n bytes."""
    return -(-n // 4096) * 4096


def tile_buffer(weights: Sequence[PackedWeight], dtype: torch.dtype) -> Tensor:
    """Room for the largest of their tiles, which a thread keeps for its next call."""
    size = max(tiles(weight.shape, dtype)[0][1] * weight.shape[1] for weight in weights)
    if planning():
        return torch.empty(size, dtype=dtype)
    if dtype not in _buffers.of or _buffers.of[dtype].numel() < size:
        _buffers.of.pop(dtype, None)  # before the new one is allocated
        _buffers.of[dtype] = torch.empty(size, dtype=dtype)
    return _buffers.of[dtype]


def plain_rows(weight: PackedWeight, first: int, n: int, buffer: Tensor) -> Tensor:
    """Rows `first` to `first + n` as plain numbers, in a buffer that the next call overwrites."""
    out = buffer[: n * weight.shape[1]].view(n, weight.shape[1])
    if not planning():
        native.read_rows(weight, None, first, out)
    return out


def tiles(shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[int, int]]:
    """(first row, rows) of the parts of a weight that fit the buffer."""
    out, width = shape
    step = max(64, _TILE_BYTES // (dtype.itemsize * max(width, 1)) // 64 * 64)
    return [(first, min(step, out - first)) for first in range(0, max(out, 1), step)]


def matrix(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` as plain numbers, by PyTorch alone."""
    q, scale, low = unpack(weight)
    wide = q.unflatten(1, (scale.shape[1], weight.group)).mul_(scale.float().unsqueeze(-1))
    if low is not None:
        wide += low.float().unsqueeze(-1)
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
    """By PyTorch alone, a bounded part of the weight at a time."""
    bias = None if bias is None else bias.to(x.dtype)
    size, step = weight.shape[0], plain_at_once(weight.shape[1])
    if size <= step:
        return torch.nn.functional.linear(x, matrix(weight, x.dtype), bias)
    out = _out(x, weight)
    for first in range(0, size, step):
        rows = slice(first, min(first + step, size))
        some = None if bias is None else bias[rows]
        # The plain part has no name, which would keep it while the next one is made.
        out[:, rows] = torch.nn.functional.linear(x, matrix(_part(weight, rows), x.dtype), some)
    return out


def plain_at_once(width: int) -> int:
    """Rows of a weight, in whole blocks, that PyTorch makes plain at once."""
    return max(1, _PLAIN_NUMBERS // max(width, 1) // BLOCK_ROWS) * BLOCK_ROWS


def _part(weight: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows, from whole blocks."""
    blocks = slice(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS))
    low = None if weight.minimum is None else weight.minimum[blocks]
    return replace(
        weight,
        shape=(rows.stop - rows.start, weight.shape[1]),
        qdata=weight.qdata[blocks],
        scale=weight.scale[blocks],
        minimum=low,
    )


def _by_tiles(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], buffer: Tensor
) -> list[Tensor]:
    wide, outs = x.to(buffer.dtype), [_out(x, weight) for weight in weights]
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        for first, n in tiles(weight.shape, buffer.dtype):
            rows = plain_rows(weight, first, n, buffer)
            out[:, first : first + n] = torch.nn.functional.linear(wide, rows)
        if bias is not None:
            out.add_(bias)
    return outs


def gated(parts: list[Tensor], gate: str) -> list[Tensor]:
    """The products themselves, or the one of gate and up."""
    if gate == "none":
        return parts
    first, second = parts
    if gate == "silu":
        return [torch.nn.functional.silu(first) * second]
    return [torch.nn.functional.gelu(first, approximate="tanh") * second]


def _out(x: Tensor, weight: PackedWeight) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _in_rows(x: Tensor) -> Tensor:
    """x with a unit stride in its rows."""
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()
