"""Launcher of the fp8 Gluon kernels: the transposed values, then attention."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.gluon.fp8.kernel import M, forward_kernel
from saccade.ops.attention.nvidia.gluon.fp8.softmax import GROUP, transpose_kernel
from saccade.ops.attention.nvidia.gluon.prefill.launch import section
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of
from saccade.ops.gpu.kernel_args import BlockLists
from saccade.ops.gpu.launching import float32, on, set_tma_allocator, tma_strided
from saccade.ops.gpu.support import multiprocessors

CONSTANTS = {"Q_STAGES": 2, "STAGES": 2, "REGISTERS": 240}
OPTIONS = {"num_warps": 4, "maxnreg": 168}  # three warpgroups share a multiprocessor's registers
TRANSPOSE_BYTES = 16384  # of a program that transposes values


def forward(problem: Problem, scales: tuple[Tensor, Tensor, Tensor]) -> AttentionOutput:
    """Output (bfloat16) and lse of fp8 queries, keys and values.

    Args:
        scales: float32 of q `[B, H]`, k and v `[B, Hkv]`.
    """
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    out = torch.empty(batch, heads, q_len, dim, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(q_len, int(M))
    work = tiles * batch * heads
    set_tma_allocator()
    with on(q.device):
        v = transposed(problem.v)
        forward_kernel[(min(work, multiprocessors(q.device)),)](
            *(tma_strided(x) for x in (q, k, v, out)),
            lse,
            float32(problem.sink_logits),
            tuple(float32(x) for x in scales),
            mask_args_of(problem),
            BlockLists(),
            float(problem.scale),
            q_len,
            problem.num_keys,
            v.shape[3],
            problem.q_offset,
            batch,
            heads,
            heads // k.shape[1],
            tiles,
            section(problem),
            work,
            CAUSAL=problem.causal,
            D=dim,
            **CONSTANTS,
            **OPTIONS,
        )
    return AttentionOutput(out, lse)


def transposed(v: Tensor) -> Tensor:
    """Values `[B, H, N, D]` as the kernel reads them: `[B, H, D, N]`, N up to whole groups."""
    batch, heads, length, dim = v.shape
    padded = triton.cdiv(length, GROUP) * GROUP
    out = torch.empty(batch, heads, dim, padded, dtype=v.dtype, device=v.device)
    block = TRANSPOSE_BYTES // dim
    transpose_kernel[(triton.cdiv(padded, block), batch * heads)](
        v.view(torch.uint8), *v.stride()[:3], out.view(torch.uint8), heads, length, padded,
        D=dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
