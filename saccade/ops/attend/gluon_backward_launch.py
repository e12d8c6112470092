"""Launcher of the Gluon gradients: which problems they take, in which order tiles are worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.attend.gluon import copyable
from saccade.ops.attend.gluon_backward import backward_kernel
from saccade.ops.attend.gluon_backward_rows import convert_kernel, prepare_kernel
from saccade.ops.attend.gluon_launch import REGISTERS_PER_THREAD_SUM, plane
from saccade.ops.attend.triton_launch import allow_scratch
from saccade.ops.attend.triton_launch import plane as any_plane
from saccade.ops.attend.triton_problem import Problem, on
from saccade.ops.whole import cdiv

ROWS, KEYS_OF_A_PROGRAM = 64, 128
L2_SHARE = 24 * 2**20  # bytes of Q, dO and dQ that neighbouring programs may work on together


@dataclass(frozen=True, slots=True)
class GluonBackwardLaunch:
    """How the kernel is cut.

    Attributes:
        q_stages, d_stages: tiles of Q and of dO that are in flight or in use.
        registers: per thread of a consumer.
    """

    q_stages: int = 3
    d_stages: int = 2
    registers: int = 240


LAUNCHES: dict[int, GluonBackwardLaunch] = {128: GluonBackwardLaunch()}


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    launch: GluonBackwardLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) of a problem that `gradient_refusal` accepts.

    dq is added up in no fixed order: two runs differ in its last bits.
    """
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    kv_heads = k.shape[1]
    launch = launch or LAUNCHES[dim]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout = dout if copyable(dout) else dout.contiguous()
    dlse = dlse.contiguous()
    tiles = cdiv(q_len, ROWS)
    delta = torch.empty_like(lse)
    stats = lse.new_empty(batch * heads * tiles * 2, ROWS)
    summed = lse.new_empty(batch * heads, tiles, ROWS * dim)
    allow_scratch()
    with on(q.device):
        prepare_kernel[(batch * heads, tiles)](
            any_plane(out), any_plane(dout), lse, dlse, delta, stats, summed, q_len, heads,
            D=dim, ROWS=ROWS,
        )  # fmt: skip
        backward_kernel[(batch * kv_heads * cdiv(problem.num_keys, KEYS_OF_A_PROGRAM),)](
            *(plane(x) for x in (q, k, v, dout, dk, dv)),
            stats,
            summed,
            float(problem.scale),
            q_len,
            problem.num_keys,
            problem.q_offset,
            batch,
            kv_heads,
            heads // kv_heads,
            section(problem),
            CAUSAL=problem.causal,
            D=dim,
            **constants(launch),
            **options(),
        )
        convert_kernel[(batch * heads, tiles)](
            summed, any_plane(dq), float(problem.scale), q_len, heads, D=dim, ROWS=ROWS
        )
    return dq, dk, dv, delta


def constants(launch: GluonBackwardLaunch) -> dict[str, int]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "Q_STAGES": launch.q_stages,
        "D_STAGES": launch.d_stages,
        "REGISTERS": launch.registers,
    }


def options() -> dict[str, int]:
    """How the kernel is compiled: warps of a warpgroup, registers a thread starts with."""
    return {"num_warps": 4, "maxnreg": REGISTERS_PER_THREAD_SUM // 3 // 8 * 8}


def section(problem: Problem) -> int:
    """KV heads that are worked on together: as many as have one query head each in the L2 cache."""
    batch, _heads, q_len, dim = problem.q.shape
    rows = batch * problem.k.shape[1]
    fitting = max(2, L2_SHARE // (8 * q_len * dim))
    return next(n for n in range(min(fitting, rows), 0, -1) if rows % n == 0)
