"""Split-KV: outputs and lse of the splits of the keys, and the kernel that combines them."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.launching import pdl_options
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.triton_lang import LN2, LOG2E, LOWEST


class SplitKVPartials:
    """Output and lse of every split, or the final tensors where there is only one.

    Attributes:
        out: `[splits, B, H, Lq, Dv]`, float32 for more than one split; lse: `[splits, B, H, Lq]`.
    """

    def __init__(self, problem: Problem, splits: int) -> None:
        q = problem.q
        self.shape = (*q.shape[:3], problem.v.shape[-1])
        dtype = q.dtype if splits == 1 else torch.float32
        self.splits = splits
        self.out = torch.empty((splits, *self.shape), dtype=dtype, device=q.device)
        self.lse = torch.empty((splits, *self.shape[:3]), dtype=torch.float32, device=q.device)

    def combine(self, dtype: torch.dtype) -> AttentionOutput:
        """Attention over all splits, the output in `dtype`."""
        if self.splits == 1:
            return AttentionOutput(self.out[0], self.lse[0])
        out = torch.empty(self.shape, dtype=dtype, device=self.out.device)
        lse = torch.empty(self.shape[:3], dtype=torch.float32, device=self.out.device)
        value_dim = self.shape[3]
        block_v, block_s, warps = combine_blocks(self.splits, value_dim)
        launch_kernel(
            combine_kernel,
            (lse.numel(), cdiv(value_dim, block_v)),
            self.out,
            self.lse,
            out,
            lse,
            self.splits,
            self.out.stride(0),
            self.lse.stride(0),
            VALUE_DIM=value_dim,
            BLOCK_V=block_v,
            BLOCK_S=block_s,
            ONCE=self.splits <= block_s,
            num_warps=warps,
            **pdl_options(self.out.device),
        )
        return AttentionOutput(out, lse)


def combine_blocks(splits: int, value_dim: int) -> tuple[int, int, int]:
    """(channels, splits, warps) of a program that combines splits.

    One warp needs no barrier, and all its loads are in flight at once, in at most 128 registers per
    thread; beyond 64 splits, four warps divide the loads (measured on an H200,
    lab/LOG_gpu_decode.md and lab/LOG_gpu_codes.md).
    """
    max_v = 128 if splits <= 16 else 64 if splits <= 32 else 32
    block_v, warps = min(max_v, next_power_of_two(value_dim)), 4 if splits > 64 else 1
    elements = 8192 if warps == 4 else 4096
    return block_v, max(1, min(next_power_of_two(splits), elements // block_v)), warps


@triton.jit
def combine_step(split_lse, split_out, m, total, acc):
    """Update (largest lse * log2(e), sum of weights, weighted outputs) by a block of splits."""
    split_lse = split_lse * LOG2E
    m_new = tl.maximum(m, tl.max(split_lse, 0))
    weight = tl.exp2(split_lse - m_new)
    rescale = tl.exp2(m - m_new)
    total = total * rescale + tl.sum(weight, 0)
    return m_new, total, acc * rescale + tl.sum(split_out * weight[:, None], 0)


@triton.jit
def combine_kernel(
    split_out, split_lse, out, lse, splits, out_stride, lse_stride,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of exp(lse_s - lse) out_s; one program per row and BLOCK_V channels.

    Addresses are computed before the wait for the preceding kernel.  ONCE: there are at most
    BLOCK_S splits.
    """
    row = tl.program_id(0).to(tl.int64)
    value_dims = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = value_dims < VALUE_DIM
    split = tl.arange(0, BLOCK_S)
    valid = split < splits
    lse_at = split_lse + split.to(tl.int64) * lse_stride + row
    at = (
        split_out + split.to(tl.int64)[:, None] * out_stride + row * VALUE_DIM + value_dims[None, :]
    )
    out_at, to = out + row * VALUE_DIM + value_dims, lse + row + tl.arange(0, 1)
    m = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_V], tl.float32)
    if PDL:  # the next kernel may start now: it waits until this one, which waits too, has ended
        gdc_launch_dependents()
        gdc_wait()
    block_lse = tl.load(lse_at, mask=valid, other=float("-inf"))
    block_out = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0)
    m, total, acc = combine_step(block_lse, block_out, m, total, acc)
    if not ONCE:
        for start in range(BLOCK_S, splits, BLOCK_S):
            valid = split < splits - start
            skipped = tl.cast(start, tl.int64)
            block_lse = tl.load(lse_at + skipped * lse_stride, mask=valid, other=float("-inf"))
            block_out = tl.load(
                at + skipped * out_stride, mask=valid[:, None] & inside[None, :], other=0.0
            )
            m, total, acc = combine_step(block_lse, block_out, m, total, acc)
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    tl.store(out_at, (acc / safe).to(out.dtype.element_ty), mask=inside)
    tl.store(to, tl.where(empty, float("-inf"), (m + tl.log2(safe)) * LN2))
