"""Launcher of the Gluon gradients: how CTAs share a GQA group, and the order of the work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from saccade.ops.attention.nvidia.gluon.backward.kernel import backward_kernel
from saccade.ops.attention.nvidia.gluon.backward.postprocess import (
    convert_dq_kernel,
    sum_dkv_kernel,
)
from saccade.ops.attention.nvidia.gluon.backward.preprocess import preprocess_kernel
from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import BLOCK_M, CONSUMERS, KEYS
from saccade.ops.attention.nvidia.gluon.prefill.launch import options
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.launching import on, set_tma_allocator, tma_aligned, tma_strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import gluon as tuning

Q_ROWS, CTA_KEYS = int(BLOCK_M), int(CONSUMERS) * int(KEYS)
SUM_ROWS = 16  # keys of a CTA that sums dK and dV


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardLaunch:
    """Launch of the kernel, a row of `saccade.ops.tuning.gluon.rows("backward")`.

    Attributes:
        stages: pipeline stages of Q and dO.
        registers: per thread of a consumer.
        l2_bytes: Q, dO and dQ that CTAs work on at one time, so that they stay in the L2 cache.
        min_waves: CTAs per multiprocessor (twice as many where keys are causal) below which groups
            are split.
    """

    stages: int
    registers: int
    l2_bytes: int
    min_waves: float


@cache
def measured_launch(head_dim: int) -> BackwardLaunch:
    """The measured launch of a head dimension."""
    return BackwardLaunch(**tuning.rows("backward")[str(head_dim)])


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    launch: BackwardLaunch | None = None,
    gqa_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) of a problem that `gradient_refusal` accepts.

    dq is accumulated in no fixed order: two runs differ in its last bits.
    """
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    launch = launch or measured_launch(dim)
    splits = gqa_splits or gqa_splits_of(problem, launch.min_waves)
    tiles = cdiv(q_len, Q_ROWS)
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    dtype = q.dtype if splits == 1 else torch.float32
    dk, dv = (q.new_empty(batch, k.shape[1] * splits, *k.shape[2:], dtype=dtype) for _ in range(2))
    dout = dout if tma_aligned(dout) else dout.contiguous()
    lse_delta = lse.new_empty(batch * heads * tiles * 2, Q_ROWS)
    dq_accum = lse.new_empty(1 + batch * heads * tiles, Q_ROWS * dim)[1:]
    with on(q.device):
        launch_kernel(preprocess_kernel, (batch * heads, tiles), 
            tma_strided(out), tma_strided(dout), lse, dlse.contiguous(), delta, lse_delta, dq_accum,
            q_len, heads, D=dim, BLOCK_M=Q_ROWS,
        )  # fmt: skip
        _products(problem, launch, splits, dout, (dk, dv, lse_delta, dq_accum))
        launch_kernel(convert_dq_kernel, (batch * heads, tiles), 
            dq_accum, tma_strided(dq), float(problem.call.scale), q_len, heads, D=dim,
            BLOCK_M=Q_ROWS,
        )  # fmt: skip
        if splits > 1:
            dk, dv = _sum_splits(problem, dk, dv, splits)
    return dq, dk, dv, delta


def _sum_splits(problem: Problem, dk: Tensor, dv: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Gradients of KV heads, out of those of the splits of their groups in float32."""
    k = problem.k
    batch, kv_heads, k_len, dim = k.shape
    sums = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)]
    launch_kernel(
        sum_dkv_kernel,
        (batch * kv_heads, cdiv(k_len, SUM_ROWS)),
        dk,
        dv,
        *sums,
        k_len,
        SPLITS=splits,
        D=dim,
        ROWS=SUM_ROWS,
    )
    return sums[0], sums[1]


def _products(
    problem: Problem,
    launch: BackwardLaunch,
    gqa_splits: int,
    dout: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """The kernel itself: dK, dV and the accumulated dQ."""
    dk, dv, lse_delta, dq_accum = results
    batch, heads, q_len, dim = problem.q.shape
    num_splits = dk.shape[1]
    set_tma_allocator()
    launch_kernel(
        backward_kernel,
        (batch * num_splits * cdiv(problem.num_keys, CTA_KEYS),),
        *(tma_strided(x) for x in (problem.q, problem.k, problem.v, dout, dk, dv)),
        lse_delta,
        dq_accum,
        mask_args_of(problem),
        float(problem.call.scale),
        q_len,
        problem.num_keys,
        problem.q_offset,
        batch,
        num_splits,
        heads // num_splits,
        gqa_splits,
        splits_per_section(problem, launch.l2_bytes, gqa_splits),
        CAUSAL=problem.mask.causal,
        D=dim,
        **constants(launch),
        **options(int(CONSUMERS)),
    )


def constants(launch: BackwardLaunch) -> dict[str, int]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {"STAGES": launch.stages, "REGISTERS": launch.registers}


def gqa_splits_of(problem: Problem, min_waves: float) -> int:
    """CTAs that share the query heads of one KV head: more where there are few keys.

    Their dK and dV are summed afterwards, in float32.  Causal keys are visible to one to all
    queries, and two CTAs per multiprocessor, the longest first, balance that.
    """
    batch, kv_heads, _, _ = problem.k.shape
    groups = problem.q.shape[1] // kv_heads
    ctas = batch * kv_heads * cdiv(problem.num_keys, CTA_KEYS)
    uneven = problem.mask.causal and problem.mask.window is None
    wanted = min_waves * multiprocessors(problem.q.device) * (2 if uneven else 1)
    divisors = (n for n in range(1, groups + 1) if groups % n == 0)
    return next((n for n in divisors if ctas * n >= wanted), groups)


def splits_per_section(problem: Problem, l2_bytes: int, gqa_splits: int = 1) -> int:
    """Splits that are computed together: as many as have one query head each in `l2_bytes`."""
    batch, _heads, q_len, dim = problem.q.shape
    rows = batch * problem.k.shape[1] * gqa_splits
    fitting = max(2, l2_bytes // (8 * q_len * dim))
    return next(n for n in range(min(fitting, rows), 0, -1) if rows % n == 0)
