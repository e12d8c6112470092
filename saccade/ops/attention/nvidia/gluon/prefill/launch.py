"""Launcher of the Gluon forward kernel: which tiles, how many programs, in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.gluon.prefill.kernel import forward_kernel
from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import RowExtents, documents_of
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of
from saccade.ops.gpu.launching import float32, on, set_tma_allocator, tma_strided
from saccade.ops.gpu.support import multiprocessors

REGISTERS_PER_THREAD_SUM = 512  # over the warpgroups of a program that has a multiprocessor alone
L2_SHARE = 32 * 2**20  # bytes of keys and values that neighbouring programs may read together


@dataclass(frozen=True, slots=True)
class GluonLaunch:
    """How the kernel is cut.

    Attributes:
        consumers: warpgroups that compute, each 64 queries.
        block_n: keys of a tile.
        q_stages, k_stages, v_stages: tiles of queries, keys and values in flight or in use.
        registers: per thread of a consumer.
        turns: consumers ask the matrix units in turns.
        direct_out: results leave from registers (there is no room for them in shared memory).
    """

    consumers: int
    block_n: int
    q_stages: int
    k_stages: int
    v_stages: int
    registers: int
    turns: bool = True
    direct_out: bool = False

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers


LAUNCHES: dict[int, GluonLaunch] = {
    64: GluonLaunch(3, 128, 2, 3, 3, 160),
    128: GluonLaunch(2, 128, 2, 2, 2, 240, turns=False),
    256: GluonLaunch(2, 64, 1, 2, 3, 240, direct_out=True),
}
# Tiles of queries that blocks of 128 are multiples of; more registers for more kinds of edges.
TWO_CONSUMERS = LAUNCHES | {
    64: GluonLaunch(2, 128, 2, 3, 3, 240),
    128: replace(LAUNCHES[128], turns=True),
}
# Rows of different lengths and pages keep more numbers in the warp that fetches.
OWN_ROWS = {dim: replace(launch, registers=232) for dim, launch in TWO_CONSUMERS.items()}


def launch_of(problem: Problem) -> GluonLaunch:
    """How a problem is cut."""
    dim = problem.q.shape[3]
    if any(part is not None for part in (problem.cu_q, problem.kv_lens, problem.q_offsets)):
        return OWN_ROWS[dim]
    whole = problem.block_mask is None and problem.window is None
    return (LAUNCHES if whole else TWO_CONSUMERS)[dim]


def forward(
    problem: Problem,
    launch: GluonLaunch | None = None,
    *,
    table: Tensor | None = None,
    out: Tensor | None = None,
) -> AttentionOutput:
    """Output and lse of a problem that the backend has accepted.

    Args:
        table: the pages of each row, where k and v of the problem are a pool of pages.
        out: where the output goes; default a contiguous tensor.
    """
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    launch = launch or launch_of(problem)
    if out is None:
        out = torch.empty(batch, heads, q_len, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    row_extents, tiles = extents_of(problem, launch, table)
    work = tiles * batch * heads
    # A tile lies in one block of a selection, so lists of tiles say everything about it.
    set_tma_allocator()
    with on(q.device):
        forward_kernel[(min(work, multiprocessors(q.device)),)](
            *(tma_strided(x) for x in (q, k, v, out)),
            lse,
            float32(problem.sink_logits),
            mask_args_of(problem.without_blocks()),
            block_lists_of(problem, tiles, launch.block_m, launch.block_n),
            row_extents,
            float(problem.scale),
            q_len,
            problem.num_keys,
            problem.q_offset,
            batch,
            heads,
            heads // k.shape[1],
            tiles,
            section(problem),
            work,
            k.shape[0],
            CAUSAL=problem.causal,
            D=dim,
            TAILS=row_extents.documents is not None or row_extents.kv_lens is not None,
            PAGE=None if table is None else k.shape[2],
            **constants(launch),
            **options(launch),
        )
    return AttentionOutput(out, lse)


def extents_of(
    problem: Problem, launch: GluonLaunch, table: Tensor | None
) -> tuple[RowExtents, int]:
    """Where rows begin and end, where that differs, and how many tiles of queries a row has."""
    kv_lens, tiles = problem.kv_lens, triton.cdiv(problem.q.shape[2], launch.block_m)
    documents = None
    if problem.cu_q is not None:
        documents = documents_of(problem, launch.block_m)
        tiles = len(documents)
    row_extents = RowExtents(
        problem.q_offsets,
        kv_lens,
        None if kv_lens is None else kv_lens.stride(0),
        documents,
        table,
        None if table is None else table.stride(0),
    )
    return row_extents, tiles


def constants(launch: GluonLaunch) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "M": launch.block_m,
        "N": launch.block_n,
        "CONSUMERS": launch.consumers,
        "Q_STAGES": launch.q_stages,
        "K_STAGES": launch.k_stages,
        "V_STAGES": launch.v_stages,
        "TURNS": launch.turns,
        "DIRECT_OUT": launch.direct_out,
        "REGISTERS": launch.registers,
    }


def options(launch: GluonLaunch) -> dict[str, int]:
    """How the kernel is compiled: warps of a warpgroup, registers a thread starts with."""
    warpgroups = launch.consumers + 1
    return {"num_warps": 4, "maxnreg": REGISTERS_PER_THREAD_SUM // warpgroups // 8 * 8}


def section(problem: Problem) -> int:
    """Query heads that are worked on together: as many as have their keys in the L2 cache."""
    batch, kv_heads, dim = problem.q.shape[0], problem.k.shape[1], problem.k.shape[3]
    k_len = problem.num_keys
    reach = k_len if problem.window is None else min(k_len, problem.window + 4096)
    fitting = max(1, L2_SHARE // (2 * reach * dim * problem.k.element_size()))
    rows = batch * kv_heads
    together = next(n for n in range(min(fitting, rows), 0, -1) if rows % n == 0)
    return together * (problem.q.shape[1] // kv_heads)
