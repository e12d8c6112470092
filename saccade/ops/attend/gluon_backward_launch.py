"""Launcher of the Gluon gradients: which problems they take, in which order tiles are worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.attend.gluon_backward import backward_kernel, convert_kernel, prepare_kernel
from saccade.ops.attend.gluon_launch import REGISTERS_PER_THREAD_SUM, plane
from saccade.ops.attend.triton_launch import allow_scratch, on
from saccade.ops.attend.triton_launch import plane as any_plane
from saccade.ops.attend.triton_problem import Problem, unit_rows
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
    """Gradients (dq, dk, dv, delta) of a problem that `refusal` accepts; dq in no fixed order."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    kv_heads = k.shape[1]
    launch = launch or LAUNCHES[dim]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout, dlse = unit_rows(dout), dlse.contiguous()
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
            Q_STAGES=launch.q_stages,
            D_STAGES=launch.d_stages,
            REGISTERS=launch.registers,
            num_warps=4,
            maxnreg=REGISTERS_PER_THREAD_SUM // 3 // 8 * 8,
        )
        convert_kernel[(batch * heads, tiles)](
            summed, any_plane(dq), float(problem.scale), q_len, heads, D=dim, ROWS=ROWS
        )
    return dq, dk, dv, delta


def section(problem: Problem) -> int:
    """KV heads that are worked on together: as many as have one query head each in the L2 cache."""
    batch, _heads, q_len, dim = problem.q.shape
    rows = batch * problem.k.shape[1]
    fitting = max(2, L2_SHARE // (8 * q_len * dim))
    return next(n for n in range(min(fitting, rows), 0, -1) if rows % n == 0)
