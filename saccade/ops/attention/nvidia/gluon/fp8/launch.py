"""Launcher of the fp8 Gluon kernels: V is transposed first, then attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.gluon.fp8.kernel import forward_kernel
from saccade.ops.attention.nvidia.gluon.fp8.producer import BLOCK_M, CONSUMERS
from saccade.ops.attention.nvidia.gluon.fp8.transpose import transpose_v
from saccade.ops.attention.nvidia.gluon.prefill.launch import heads_per_section, options
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.kernel_args import BlockLists
from saccade.ops.gpu.launching import float32, on, set_tma_allocator, tma_strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import gluon as tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Launch:
    """Launch of the kernel, a row of `saccade.ops.tuning.gluon.rows("fp8")`.

    Attributes:
        q_stages, kv_stages: pipeline stages, each a tile in shared memory.
        registers: per thread of a consumer.
        l2_bytes: K and V that CTAs read at one time, so that they stay in the L2 cache.
    """

    q_stages: int
    kv_stages: int
    registers: int
    l2_bytes: int


@cache
def measured_launch(head_dim: int) -> FP8Launch:
    """The measured launch of a head dimension."""
    return FP8Launch(**tuning.rows("fp8")[str(head_dim)])


def forward(problem: Problem, scales: tuple[Tensor, Tensor, Tensor]) -> AttentionOutput:
    """Output (bfloat16) and lse of fp8 queries, keys and values.

    Args:
        scales: float32 of q `[B, H]`, k and v `[B, Hkv]`.
    """
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    launch = measured_launch(dim)
    out = torch.empty(batch, heads, q_len, dim, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    num_q_tiles = cdiv(q_len, int(BLOCK_M))
    num_work_tiles = num_q_tiles * batch * heads
    set_tma_allocator()
    with on(q.device):
        v = transpose_v(problem.v)
        launch_kernel(
            forward_kernel,
            (min(num_work_tiles, multiprocessors(q.device)),),
            *(tma_strided(x) for x in (q, k, v, out)),
            lse,
            float32(problem.call.sink_logits),
            tuple(float32(x) for x in scales),
            mask_args_of(problem),
            BlockLists(),
            float(problem.call.scale),
            q_len,
            problem.num_keys,
            v.shape[3],
            problem.q_offset,
            batch,
            heads,
            heads // k.shape[1],
            num_q_tiles,
            heads_per_section(problem, launch.l2_bytes),
            num_work_tiles,
            CAUSAL=problem.mask.causal,
            D=dim,
            **constants(launch),
            **options(int(CONSUMERS)),
        )
    return AttentionOutput(out, lse)


def constants(launch: FP8Launch) -> dict[str, int]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "Q_STAGES": launch.q_stages,
        "KV_STAGES": launch.kv_stages,
        "REGISTERS": launch.registers,
    }
