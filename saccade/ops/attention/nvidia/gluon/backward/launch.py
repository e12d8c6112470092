"""Launcher of the Gluon gradients: which problems they take, in which order tiles are worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.attention.nvidia.gluon.backward.kernel import backward_kernel
from saccade.ops.attention.nvidia.gluon.backward.rowwise import (
    convert_kernel,
    prepare_kernel,
    sum_kernel,
)
from saccade.ops.attention.nvidia.gluon.prefill.launch import REGISTERS_PER_THREAD_SUM
from saccade.ops.attention.nvidia.gluon.support import copyable
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.launching import on, set_tma_allocator, tma_strided
from saccade.ops.gpu.launching import tma_strided as any_plane
from saccade.ops.gpu.support import multiprocessors

ROWS, KEYS_OF_A_PROGRAM = 64, 128
ROWS_OF_SUMS = 16
FULL = 0.9  # a card with as many programs is: one each, or two where keys are causal
L2_SHARE = 24 * 2**20  # bytes of Q, dO and dQ that neighbouring programs may work on together


@dataclass(frozen=True, slots=True)
class GluonBackwardLaunch:
    """How the kernel is cut.

    Attributes:
        stages: tiles of queries that are in flight or in use.
        registers: per thread of a consumer.
    """

    stages: int = 3
    registers: int = 240


LAUNCHES: dict[int, GluonBackwardLaunch] = {
    64: GluonBackwardLaunch(),
    128: GluonBackwardLaunch(),
}


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    launch: GluonBackwardLaunch | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) of a problem that `gradient_refusal` accepts.

    dq is added up in no fixed order: two runs differ in its last bits.
    """
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    splits = splits or splits_of(problem)
    tiles = cdiv(q_len, ROWS)
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    kind = q.dtype if splits == 1 else torch.float32
    dk, dv = (q.new_empty(batch, k.shape[1] * splits, *k.shape[2:], dtype=kind) for _ in range(2))
    dout = dout if copyable(dout) else dout.contiguous()
    stats = lse.new_empty(batch * heads * tiles * 2, ROWS)
    summed = lse.new_empty(1 + batch * heads * tiles, ROWS * dim)[1:]
    with on(q.device):
        prepare_kernel[(batch * heads, tiles)](
            any_plane(out), any_plane(dout), lse, dlse.contiguous(), delta, stats, summed, q_len,
            heads, D=dim, ROWS=ROWS,
        )  # fmt: skip
        _products(problem, launch or LAUNCHES[dim], splits, dout, (dk, dv, stats, summed))
        convert_kernel[(batch * heads, tiles)](
            summed, any_plane(dq), float(problem.scale), q_len, heads, D=dim, ROWS=ROWS
        )
        if splits > 1:
            dk, dv = _sums_of_shares(problem, dk, dv, splits)
    return dq, dk, dv, delta


def _sums_of_shares(problem: Problem, dk: Tensor, dv: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Gradients of KV heads, out of those that their shares left in float32."""
    k = problem.k
    batch, kv_heads, k_len, dim = k.shape
    sums = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)]
    sum_kernel[(batch * kv_heads, cdiv(k_len, ROWS_OF_SUMS))](
        dk, dv, *sums, k_len, SPLITS=splits, D=dim, ROWS=ROWS_OF_SUMS
    )
    return sums[0], sums[1]


def _products(
    problem: Problem,
    launch: GluonBackwardLaunch,
    splits: int,
    dout: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """The kernel itself: dK, dV and the sums of dQ."""
    dk, dv, stats, summed = results
    batch, heads, q_len, dim = problem.q.shape
    shares = dk.shape[1]
    set_tma_allocator()
    backward_kernel[(batch * shares * cdiv(problem.num_keys, KEYS_OF_A_PROGRAM),)](
        *(tma_strided(x) for x in (problem.q, problem.k, problem.v, dout, dk, dv)),
        stats,
        summed,
        mask_args_of(problem),
        float(problem.scale),
        q_len,
        problem.num_keys,
        problem.q_offset,
        batch,
        shares,
        heads // shares,
        splits,
        section(problem, splits),
        CAUSAL=problem.causal,
        D=dim,
        **constants(launch),
        **options(),
    )


def constants(launch: GluonBackwardLaunch) -> dict[str, int]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "STAGES": launch.stages,
        "REGISTERS": launch.registers,
    }


def options() -> dict[str, int]:
    """How the kernel is compiled: warps of a warpgroup, registers a thread starts with."""
    return {"num_warps": 4, "maxnreg": REGISTERS_PER_THREAD_SUM // 3 // 8 * 8}


def splits_of(problem: Problem) -> int:
    """Programs that share the query heads of one KV head: more where there is too little work.

    Their dK and dV are summed afterwards, in float32.  Causal keys are seen by one to all queries,
    and two programs a multiprocessor, the longest first, even that out.
    """
    batch, kv_heads, _, _ = problem.k.shape
    groups = problem.q.shape[1] // kv_heads
    programs = batch * kv_heads * cdiv(problem.num_keys, KEYS_OF_A_PROGRAM)
    uneven = problem.causal and problem.window is None
    wanted = FULL * multiprocessors(problem.q.device) * (2 if uneven else 1)
    fitting = (n for n in range(1, groups + 1) if groups % n == 0)
    return next((n for n in fitting if programs * n >= wanted), groups)


def section(problem: Problem, splits: int = 1) -> int:
    """Shares that are worked on together: as many as have one query head each in the L2 cache."""
    batch, _heads, q_len, dim = problem.q.shape
    rows = batch * problem.k.shape[1] * splits
    fitting = max(2, L2_SHARE // (8 * q_len * dim))
    return next(n for n in range(min(fitting, rows), 0, -1) if rows % n == 0)
