"""Launcher of the Gluon gradients in squares: which tiles, how many programs, in which order.

The kernel adds dQ by atomic additions, so equal runs differ in its last bits; under
torch.use_deterministic_algorithms gradients come from the Triton kernels (`gluon_training.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops import tuning
from saccade.ops.attend.gluon import copyable
from saccade.ops.attend.gluon_launch import plane
from saccade.ops.attend.gluon_squares import squares_kernel
from saccade.ops.attend.gluon_squares_rows import collect_kernel, rows_kernel
from saccade.ops.attend.triton_launch import allow_scratch, rules_of
from saccade.ops.attend.triton_problem import Problem, on
from saccade.ops.whole import cdiv

HEADS_TOGETHER = 8  # KV heads whose queries and gradients neighbouring programs read together

PROGRAMS_EACH = 3  # programs to aim for per multiprocessor: tiles of causal keys differ in length


@dataclass(frozen=True, slots=True)
class SquaresLaunch:
    """How the kernel is cut.

    Attributes:
        block_m: queries of a tile; a program owns 128 keys.
        stages: tiles of queries that are in flight or in use.
        early: dV is asked for before dS is computed, which takes a few registers more.
        registers: per thread of a consumer.
    """

    block_m: int
    stages: int
    early: bool
    registers: int = 240
    block_n: int = 128


LAUNCHES: dict[int, SquaresLaunch] = {
    64: SquaresLaunch(128, 2, True),
    128: SquaresLaunch(64, 2, False),
}


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    launch: SquaresLaunch | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta), delta being rowsum(dout * out) - dlse `[B, H, Lq]`."""
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    launch = launch or LAUNCHES[dim]
    splits = splits or shares(problem, cdiv(problem.num_keys, launch.block_n))
    q_tiles = cdiv(q_len, launch.block_m)
    kind = q.dtype if splits == 1 else torch.float32
    shape = (batch, k.shape[1] * splits, problem.num_keys, dim)
    dk, dv = (q.new_empty(shape, dtype=kind) for _ in range(2))
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    rows = lse.new_empty(batch * heads * q_tiles, 2, launch.block_m)
    squares = lse.new_empty(batch * heads * q_tiles + 1, launch.block_m * dim)
    dout = dout if copyable(dout) else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    where = (q_len, heads, q_tiles)
    cut = {"D": dim, "M": launch.block_m, "num_warps": 8}
    with on(q.device):
        rows_kernel[(batch * heads, q_tiles)](
            plane(out), plane(dout), lse, dlse, delta, rows, squares, *where, **cut
        )
        _products(problem, launch, splits, dout, (dk, dv, squares, rows))
        collect_kernel[(batch * heads, q_tiles)](
            squares, plane(dq), float(problem.scale), *where, **cut
        )
    if splits > 1:
        parts = (*k.shape[:2], splits, *shape[2:])
        dk, dv = (x.view(parts).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv, delta


def _products(
    problem: Problem,
    launch: SquaresLaunch,
    splits: int,
    dout: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """The kernel itself: dK, dV and the squares of dQ."""
    dk, dv, squares, rows = results
    batch, heads, q_len, dim = problem.q.shape
    shares_in_all = dk.shape[1]
    k_tiles = cdiv(problem.num_keys, launch.block_n)
    allow_scratch()
    squares_kernel[(batch * shares_in_all * k_tiles,)](
        *(plane(x) for x in (problem.q, problem.k, problem.v, dout, dk, dv)),
        squares,
        rows,
        rules_of(problem),
        float(problem.scale),
        q_len,
        problem.num_keys,
        problem.q_offset,
        batch,
        heads,
        heads // shares_in_all,
        splits,
        cdiv(q_len, launch.block_m),
        k_tiles,
        section(batch * shares_in_all),
        CAUSAL=problem.causal,
        D=dim,
        **constants(launch),
        **options(),
    )


def shares(problem: Problem, k_tiles: int) -> int:
    """Programs that share the query heads of one KV head: more where there is too little work.

    Their dK and dV are summed afterwards, in float32.
    """
    batch, kv_heads = problem.k.shape[:2]
    groups = problem.q.shape[1] // kv_heads
    wanted = PROGRAMS_EACH * tuning.multiprocessors(problem.q.device)
    fitting = (n for n in range(1, groups + 1) if groups % n == 0)
    enough = (n for n in fitting if batch * kv_heads * n * k_tiles >= wanted)
    return next(enough, groups)


def section(rows: int) -> int:
    """Heads that are worked on together, out of `rows` in all."""
    return next(n for n in range(min(HEADS_TOGETHER, rows), 0, -1) if rows % n == 0)


def constants(launch: SquaresLaunch) -> dict[str, int]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "M": launch.block_m,
        "N": launch.block_n,
        "STAGES": launch.stages,
        "EARLY": launch.early,
        "REGISTERS": launch.registers,
    }


def options() -> dict[str, int]:
    """How the kernel is compiled: three warpgroups share the registers of a multiprocessor."""
    return {"num_warps": 4, "maxnreg": 168}
