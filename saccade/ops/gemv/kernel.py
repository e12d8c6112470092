"""The kernels behind `ops.gemv`: a program reads some rows of a matrix once, and all of x.

They are launched with PDL: a program starts while the preceding kernel still runs, issues its first
loads of weights, which no kernel writes, and then waits before it loads x.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.launching import on, pdl_options
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import architecture
from saccade.ops.tuning.gemv import GATED_MLP, LINEAR, GemvLaunch, launches


@triton.jit
def load_step(at, columns, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Load some columns, 0 past the last one; masked only where STEP does not divide COLUMNS."""
    if COLUMNS % STEP == 0:
        found = tl.load(at + columns)
    else:
        found = tl.load(at + columns, mask=columns < COLUMNS, other=0.0)
    return found


@triton.jit
def dot_rows(x, lines, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """float32 `[ROWS]`: rows of a matrix, `lines` `[ROWS, 1]` pointing to them, times x.

    Weights are loaded one iteration ahead; threads' partial sums are added once, at the end.
    """
    columns = tl.arange(0, STEP)
    total = tl.zeros([ROWS, STEP], tl.float32)
    part = load_step(lines, columns[None, :], COLUMNS, STEP)
    if PDL:
        gdc_wait()
    for first in range(STEP, COLUMNS, STEP):
        ahead = load_step(lines, first + columns[None, :], COLUMNS, STEP)
        total += part.to(tl.float32) * load_step(x, first - STEP + columns, COLUMNS, STEP)[None, :]
        part = ahead
    last: tl.constexpr = (COLUMNS - 1) // STEP * STEP
    total += part.to(tl.float32) * load_step(x, last + columns, COLUMNS, STEP)[None, :]
    return tl.sum(total, 1)


@triton.jit
def linear_rows(x, weight, bias, out, at, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows `at` onwards of a linear layer: weight `[count, COLUMNS]` times x, plus `bias`."""
    rows = at + tl.arange(0, ROWS)
    inside = rows < count
    rows = tl.minimum(rows, count - 1).to(tl.int64)  # so that reads need no mask
    y = dot_rows(x, weight + rows[:, None] * COLUMNS, COLUMNS, ROWS, STEP, PDL)
    if bias is not None:
        y += tl.load(bias + rows).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linears_kernel(x, a, b, c, a_bias, b_bias, c_bias, out, a_rows, b_rows, c_rows,
                   COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """Up to three linear layers of x: their rows follow each other in the grid and in `out`."""
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(0)
    a_blocks, b_blocks = tl.cdiv(a_rows, ROWS), tl.cdiv(b_rows, ROWS)
    if block < a_blocks:
        linear_rows(x, a, a_bias, out, block * ROWS, a_rows, COLUMNS, ROWS, STEP, PDL)
    elif block < a_blocks + b_blocks:
        at = (block - a_blocks) * ROWS
        linear_rows(x, b, b_bias, out + a_rows, at, b_rows, COLUMNS, ROWS, STEP, PDL)
    else:
        at = (block - a_blocks - b_blocks) * ROWS
        linear_rows(x, c, c_bias, out + a_rows + b_rows, at, c_rows, COLUMNS, ROWS, STEP, PDL)


@triton.jit
def gated_mlp_kernel(x, gate, up, out, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                     STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate x) * (up x): a program computes the same rows of both."""
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    rows = tl.minimum(rows, count - 1).to(tl.int64)
    gates, ups = gate + rows[:, None] * COLUMNS, up + rows[:, None] * COLUMNS
    columns = tl.arange(0, STEP)
    left, right = tl.zeros([ROWS, STEP], tl.float32), tl.zeros([ROWS, STEP], tl.float32)
    a = load_step(gates, columns[None, :], COLUMNS, STEP)
    b = load_step(ups, columns[None, :], COLUMNS, STEP)
    if PDL:
        gdc_wait()
    for first in range(STEP, COLUMNS, STEP):
        a_next = load_step(gates, first + columns[None, :], COLUMNS, STEP)
        b_next = load_step(ups, first + columns[None, :], COLUMNS, STEP)
        part = load_step(x, first - STEP + columns, COLUMNS, STEP).to(tl.float32)[None, :]
        left += a.to(tl.float32) * part
        right += b.to(tl.float32) * part
        a, b = a_next, b_next
    last: tl.constexpr = (COLUMNS - 1) // STEP * STEP
    part = load_step(x, last + columns, COLUMNS, STEP).to(tl.float32)[None, :]
    y = tl.sum(left + a.to(tl.float32) * part, 1)
    y = y / (1 + tl.exp(-y)) * tl.sum(right + b.to(tl.float32) * part, 1)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_kernel(a, b, weight, total, normed, offset, eps, SIZE: tl.constexpr,
                        BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """total = a + b; normed = total / sqrt(mean(total^2) + eps) * (weight + offset).

    One program per row; without b it is the norm of a.
    """
    if PDL:
        gdc_launch_dependents()
    dims = tl.arange(0, BLOCK)
    inside = dims < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + dims
    factor = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32) + offset
    if PDL:
        gdc_wait()
    x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    if b is not None:
        x += tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)
        tl.store(total + at, x, mask=inside)
        x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / SIZE + eps) * factor
    tl.store(normed + at, x.to(normed.dtype.element_ty), mask=inside)


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Up to three linear layers of x `[K]`, with biases -> `[N]` each, in one buffer."""
    launch = _launch(x, LINEAR)
    counts = [len(weight) for weight in weights]
    out = torch.empty(sum(counts), dtype=x.dtype, device=x.device)
    unused = 3 - len(weights)
    with on(x.device):
        launch_kernel(
            linears_kernel,
            (sum(cdiv(count, launch.rows) for count in counts),),
            x,
            *weights,
            *weights[-1:] * unused,
            *biases,
            *biases[-1:] * unused,
            out,
            *counts,
            *[0] * unused,
            **_options(x, launch),
        )
    return list(out.split(counts))


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate x) * (up x) of x `[K]` -> `[N]`."""
    launch, count = _launch(x, GATED_MLP), len(gate)
    out = torch.empty(count, dtype=x.dtype, device=x.device)
    with on(x.device):
        launch_kernel(
            gated_mlp_kernel,
            (cdiv(count, launch.rows),),
            x,
            gate,
            up,
            out,
            count,
            **_options(x, launch),
        )
    return out


def _launch(x: Tensor, kernel: str) -> GemvLaunch:
    found = launches(architecture(x.device))
    assert found is not None  # checked by `supports`
    return found[kernel]


def _options(x: Tensor, launch: GemvLaunch) -> dict[str, Any]:
    step = min(launch.columns, next_power_of_two(len(x)))
    sizes = {"COLUMNS": len(x), "ROWS": launch.rows, "STEP": step}
    return sizes | {"num_warps": launch.warps} | pdl_options(x.device)


def add_rms_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """a + b `[.., K]`, or a without b, and its RMS norm times weight + offset; contiguous rows."""
    total, normed = a if b is None else torch.empty_like(a), torch.empty_like(a)
    size = a.shape[-1]
    with on(a.device):
        launch_kernel(
            add_rms_norm_kernel,
            (a.numel() // size,),
            a,
            b,
            weight,
            total,
            normed,
            offset,
            eps,
            SIZE=size,
            BLOCK=next_power_of_two(size),
            num_warps=8 if size > 1024 else 1,
            **pdl_options(a.device),
        )
    return total, normed
