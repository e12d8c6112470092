"""The Walsh-Hadamard transform by Triton: a program for each of a few rows, tiles of many rows."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.launching import on, unit_rows
from saccade.ops.gpu.replay import launch_kernel

TILE = 64  # rows of a program


@triton.jit
def unscaled_hadamard(x, HALF: tl.constexpr):
    """The transform of `[HALF]` without its factor: matrix entries are (-1)^popcount(i & j)."""
    i = tl.arange(0, HALF)[:, None] & tl.arange(0, HALF)[None, :]
    i = i ^ (i >> 8)
    i = i ^ (i >> 4)
    i = i ^ (i >> 2)
    i = i ^ (i >> 1)
    return tl.sum(tl.where((i & 1) != 0, -x[:, None], x[:, None]), 0)


@triton.jit
def hadamard_kernel(x, out, row, DIM: tl.constexpr, HALF: tl.constexpr):
    """The transform of one row; `row` is the stride of x, and `out` is contiguous."""
    at = tl.program_id(0).to(tl.int64)
    x += at * row
    out += at * DIM
    dims = tl.arange(0, HALF)
    inside = dims < DIM // 2
    low = tl.load(x + dims, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + dims + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.cast(DIM, tl.float32))
    low, high = (
        unscaled_hadamard(low + high, HALF) * factor,
        unscaled_hadamard(low - high, HALF) * factor,
    )
    tl.store(out + dims, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + dims + DIM // 2, high.to(out.dtype.element_ty), mask=inside)


def hadamard_rows(x: Tensor) -> Tensor:
    """`hadamard_transform` of rows `[.., D]`, D a power of two, by one kernel."""
    dim = x.shape[-1]
    rows = unit_rows(x.reshape(-1, dim))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x.device):
        launch_kernel(
            hadamard_kernel,
            (len(rows),),
            rows,
            out,
            rows.stride(0),
            DIM=dim,
            HALF=next_power_of_two(dim // 2),
            num_warps=4,
        )
    return out


@triton.jit
def hadamard_tiles_kernel(
    x, out, signs, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """The transform of a tile of contiguous rows of PARTS x WIDTH numbers of 16 bits.

    The matrix of all is that of PARTS (+-1) whose entries are multiplied with `signs`
    `[WIDTH, WIDTH]`.  Products of numbers with +-1 are exact, and are added up in float32.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, WIDTH)
    keep = (row < rows)[:, None]
    at = row[:, None] * (PARTS * WIDTH) + dims[None, :]
    h = tl.load(signs + dims[:, None] * WIDTH + dims[None, :])
    for to in tl.static_range(PARTS):
        total = tl.zeros([TILE, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            product = tl.dot(tl.load(x + at + part * WIDTH, mask=keep, other=0.0), h)
            common = to & part
            total += product if (common ^ (common >> 1)) & 1 == 0 else -product
        scaled = total / tl.sqrt(tl.cast(PARTS * WIDTH, tl.float32))
        tl.store(out + at + to * WIDTH, scaled.to(out.dtype.element_ty), mask=keep)


def hadamard_many_rows(x: Tensor, signs: Tensor) -> Tensor:
    """`hadamard_transform` of rows `[.., D]` in 16 bits, D a power of two up to 512.

    Args:
        signs: the matrix without its factor, `[min(D, 128)] * 2`, in the dtype of x.
    """
    dim, width = x.shape[-1], len(signs)
    rows = x.reshape(-1, dim).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x.device):
        launch_kernel(
            hadamard_tiles_kernel,
            (cdiv(len(rows), TILE),),
            rows,
            out,
            signs,
            len(rows),
            PARTS=dim // width,
            WIDTH=width,
            TILE=TILE,
            num_warps=4,
        )
    return out
