"""The kernels behind `ops.one_row`: a program reads some rows of a matrix once, and all of x.

From Hopper on programs begin while the kernel before still runs: they fetch their first weights,
which nobody writes, and wait for x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops.gpu.intmath import cdiv, power_of_two
from saccade.ops.gpu.launching import on, pdl_options


class Cut(NamedTuple):
    """How a product is cut.

    Attributes:
        rows: of a program; columns: of one step of its loop; warps: of a program.
    """

    rows: int
    columns: int
    warps: int


PRODUCTS, GATED = Cut(2, 1024, 4), Cut(1, 2048, 4)  # lab/LOG_gpu_step.md


@triton.jit
def fetch(at, columns, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Numbers at some columns, 0 behind the last one; a mask only where steps do not fit."""
    if COLUMNS % STEP == 0:
        found = tl.load(at + columns)
    else:
        found = tl.load(at + columns, mask=columns < COLUMNS, other=0.0)
    return found


@triton.jit
def dots(x, lines, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
         PDL: tl.constexpr):  # fmt: skip
    """float32 `[ROWS]`: lines `[ROWS, 1]` of a matrix times x.

    One step of weights is fetched ahead; the sums of threads meet once, at the end.
    """
    columns = tl.arange(0, STEP)
    total = tl.zeros([ROWS, STEP], tl.float32)
    part = fetch(lines, columns[None, :], COLUMNS, STEP)
    if PDL:
        gdc_wait()
    for first in range(STEP, COLUMNS, STEP):
        ahead = fetch(lines, first + columns[None, :], COLUMNS, STEP)
        total += part.to(tl.float32) * fetch(x, first - STEP + columns, COLUMNS, STEP)[None, :]
        part = ahead
    last: tl.constexpr = (COLUMNS - 1) // STEP * STEP
    total += part.to(tl.float32) * fetch(x, last + columns, COLUMNS, STEP)[None, :]
    return tl.sum(total, 1)


@triton.jit
def product(x, weight, bias, out, at, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
            STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows from `at` on of a matrix `[count, COLUMNS]` times x, plus `bias`, into `out`."""
    rows = at + tl.arange(0, ROWS)
    held = rows < count
    rows = tl.minimum(rows, count - 1).to(tl.int64)  # so that reads need no mask
    y = dots(x, weight + rows[:, None] * COLUMNS, COLUMNS, ROWS, STEP, PDL)
    if bias is not None:
        y += tl.load(bias + rows).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def products_kernel(x, a, b, c, a_bias, b_bias, c_bias, out, a_rows, b_rows, c_rows,
                    COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """Up to three matrices times x, one after the other in the programs and in `out`."""
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(0)
    a_blocks, b_blocks = tl.cdiv(a_rows, ROWS), tl.cdiv(b_rows, ROWS)
    if block < a_blocks:
        product(x, a, a_bias, out, block * ROWS, a_rows, COLUMNS, ROWS, STEP, PDL)
    elif block < a_blocks + b_blocks:
        at = (block - a_blocks) * ROWS
        product(x, b, b_bias, out + a_rows, at, b_rows, COLUMNS, ROWS, STEP, PDL)
    else:
        at = (block - a_blocks - b_blocks) * ROWS
        product(x, c, c_bias, out + a_rows + b_rows, at, c_rows, COLUMNS, ROWS, STEP, PDL)


@triton.jit
def gated_kernel(x, gate, up, out, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                 STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate x) * (up x): a program has the same rows of both."""
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = rows < count
    rows = tl.minimum(rows, count - 1).to(tl.int64)
    gates, ups = gate + rows[:, None] * COLUMNS, up + rows[:, None] * COLUMNS
    columns = tl.arange(0, STEP)
    left, right = tl.zeros([ROWS, STEP], tl.float32), tl.zeros([ROWS, STEP], tl.float32)
    a = fetch(gates, columns[None, :], COLUMNS, STEP)
    b = fetch(ups, columns[None, :], COLUMNS, STEP)
    if PDL:
        gdc_wait()
    for first in range(STEP, COLUMNS, STEP):
        a_next = fetch(gates, first + columns[None, :], COLUMNS, STEP)
        b_next = fetch(ups, first + columns[None, :], COLUMNS, STEP)
        part = fetch(x, first - STEP + columns, COLUMNS, STEP).to(tl.float32)[None, :]
        left += a.to(tl.float32) * part
        right += b.to(tl.float32) * part
        a, b = a_next, b_next
    last: tl.constexpr = (COLUMNS - 1) // STEP * STEP
    part = fetch(x, last + columns, COLUMNS, STEP).to(tl.float32)[None, :]
    y = tl.sum(left + a.to(tl.float32) * part, 1)
    y = y / (1 + tl.exp(-y)) * tl.sum(right + b.to(tl.float32) * part, 1)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def sum_and_norm_kernel(a, b, weight, total, normed, offset, eps, SIZE: tl.constexpr,
                        BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """total = a + b; normed = total / sqrt(mean(total^2) + eps) * (weight + offset).

    A program has one row; without b it is the norm of a.
    """
    if PDL:
        gdc_launch_dependents()
    dims = tl.arange(0, BLOCK)
    held = dims < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + dims
    factor = tl.load(weight + dims, mask=held, other=0.0).to(tl.float32) + offset
    if PDL:
        gdc_wait()
    x = tl.load(a + at, mask=held, other=0.0).to(tl.float32)
    if b is not None:
        x += tl.load(b + at, mask=held, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)
        tl.store(total + at, x, mask=held)
        x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / SIZE + eps) * factor
    tl.store(normed + at, x.to(normed.dtype.element_ty), mask=held)


def products(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], cut: Cut | None = None
) -> list[Tensor]:
    """Up to three matrices `[N, K]` times x `[K]`, plus biases -> `[N]` each, in one buffer."""
    cut = cut or PRODUCTS
    counts = [len(weight) for weight in weights]
    out = torch.empty(sum(counts), dtype=x.dtype, device=x.device)
    spare = 3 - len(weights)
    with on(x.device):
        products_kernel[(sum(cdiv(count, cut.rows) for count in counts),)](
            x,
            *weights,
            *weights[-1:] * spare,
            *biases,
            *biases[-1:] * spare,
            out,
            *counts,
            *[0] * spare,
            **_options(x, cut),
        )
    return list(out.split(counts))


def gated(x: Tensor, gate: Tensor, up: Tensor, cut: Cut | None = None) -> Tensor:
    """silu(gate x) * (up x) of x `[K]` -> `[N]`."""
    cut = cut or GATED
    out = torch.empty(len(gate), dtype=x.dtype, device=x.device)
    with on(x.device):
        gated_kernel[(cdiv(len(gate), cut.rows),)](x, gate, up, out, len(gate), **_options(x, cut))
    return out


def _options(x: Tensor, cut: Cut) -> dict[str, Any]:
    columns = min(cut.columns, power_of_two(len(x)))
    meaning = {"COLUMNS": len(x), "ROWS": cut.rows, "STEP": columns}
    return meaning | {"num_warps": cut.warps} | pdl_options(x.device)


def sum_and_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """a + b `[.., K]`, or a without b, and its RMS norm times weight + offset; contiguous rows."""
    total, normed = a if b is None else torch.empty_like(a), torch.empty_like(a)
    size = a.shape[-1]
    with on(a.device):
        sum_and_norm_kernel[(a.numel() // size,)](
            a,
            b,
            weight,
            total,
            normed,
            offset,
            eps,
            SIZE=size,
            BLOCK=power_of_two(size),
            num_warps=8 if size > 1024 else 1,
            **pdl_options(a.device),
        )
    return total, normed
