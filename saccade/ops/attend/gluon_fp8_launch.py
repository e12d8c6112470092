"""Launcher of the fp8 Gluon kernels: the transposed values, then attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops import tuning
from saccade.ops.attend.gluon_fp8_forward import GROUP, forward_kernel, transpose_kernel
from saccade.ops.attend.gluon_launch import options, plane, section
from saccade.ops.attend.triton_launch import allow_scratch, on, rules_of
from saccade.ops.attend.triton_problem import Problem, float32

Q_STAGES = 2  # tiles of queries that are there or on their way
TRANSPOSE_BYTES = 16384  # of a program that transposes values


@dataclass(frozen=True, slots=True)
class Fp8Launch:
    """How the kernel is cut.

    Attributes:
        consumers: warpgroups that compute, each 64 queries.
        block_n: keys of a tile.
        stages: tiles of keys, and of values, that are in flight or in use.
        registers: per thread of a consumer.
        two_sums: products of a tile are summed on their own, then added in float32.
        by_hand: how many of four exponentials are computed by multiply-adds.
    """

    consumers: int
    block_n: int
    stages: int
    registers: int
    two_sums: bool = True
    by_hand: int = 1

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers


LAUNCHES: dict[int, Fp8Launch] = {
    64: Fp8Launch(2, 128, 2, 240),
    128: Fp8Launch(2, 128, 2, 240),
    256: Fp8Launch(2, 64, 2, 240, two_sums=False, by_hand=0),
}


def forward(
    problem: Problem, scales: tuple[Tensor, Tensor, Tensor], launch: Fp8Launch | None = None
) -> AttentionOutput:
    """Output (bfloat16) and lse of fp8 queries, keys and values.

    Args:
        scales: float32 of q `[B, H]`, k and v `[B, Hkv]`.
    """
    q, k = problem.q, problem.k
    batch, heads, q_len, dim = q.shape
    launch = launch or LAUNCHES[dim]
    out = torch.empty(batch, heads, q_len, dim, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(q_len, launch.block_m)
    work = tiles * batch * heads
    programs = min(work, tuning.multiprocessors(q.device))
    allow_scratch()
    with on(q.device):
        v = transposed(problem.v)
        forward_kernel[(programs,)](
            *(plane(x) for x in (q, k, v, out)),
            lse,
            float32(problem.sink_logits),
            tuple(float32(x) for x in scales),
            rules_of(problem),
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
            **constants(launch),
            **options(launch),
        )
    return AttentionOutput(out, lse)


def constants(launch: Fp8Launch) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "M": launch.block_m,
        "N": launch.block_n,
        "CONSUMERS": launch.consumers,
        "STAGES": launch.stages,
        "Q_STAGES": Q_STAGES,
        "TWO_SUMS": launch.two_sums,
        "BY_HAND": launch.by_hand,
        "REGISTERS": launch.registers,
    }


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
