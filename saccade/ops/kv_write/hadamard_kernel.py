"""The Walsh-Hadamard transform as a Triton kernel, one row per program."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import next_power_of_two
from saccade.ops.gpu.launching import on, unit_rows
from saccade.ops.gpu.replay import launch_kernel


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
