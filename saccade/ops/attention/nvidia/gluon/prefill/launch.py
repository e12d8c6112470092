"""Launcher of the Gluon prefill kernel: tile sizes, pipeline stages, grid and order of the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.gluon.prefill.kernel import forward_kernel
from saccade.ops.attention.nvidia.gluon.prefill.selected import heads_of_tile, parts_of_tile
from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import VarlenInfo, varlen_q_tiles
from saccade.ops.attention.nvidia.gluon.prefill.splits import NOT_SHARED, Sharing, sharing_of
from saccade.ops.attention.nvidia.gluon.prefill.support import tile_dim
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of, score_args_of
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.launching import on, set_tma_allocator, tma_strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import gluon as tuning

FEW_ROWS = 128  # of the tiles of problems that are shared out; see `splits`
REGISTERS_PER_LANE = 512  # 65536 registers of a multiprocessor over the 128 threads of a warpgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLaunch:
    """Launch of the kernel, a row of `saccade.ops.tuning.gluon.rows("prefill")`.

    Attributes:
        consumers: warpgroups that compute, 64 queries each.
        block_n: keys of a tile.
        q_stages, k_stages, v_stages: pipeline stages, each a tile in shared memory.
        registers: per thread of a consumer.
        l2_bytes: K and V that CTAs read at one time, so that they stay in the L2 cache.
        pingpong: consumers issue their products alternately.
        direct_store: O is stored from registers (shared memory has no room for it).
        pack, splits: see Sharing.
        parts: blocks of a selection that a tile of keys holds side by side.
    """

    consumers: int
    block_n: int
    q_stages: int
    k_stages: int
    v_stages: int
    registers: int
    l2_bytes: int
    pingpong: bool = True
    direct_store: bool = False
    pack: int = 1
    splits: int = 1
    parts: int = 1

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers // self.pack


@cache
def measured_launch(head_dim: int, variant: str = "") -> PrefillLaunch:
    """The measured launch of a head dimension's tiles: variant "", "masked" or "varlen"."""
    width = tile_dim(head_dim)
    name = f"{width}/{variant}" if variant else str(width)
    return PrefillLaunch(**tuning.rows("prefill")[name])


def launch_of(
    problem: Problem, sharing: Sharing = NOT_SHARED, *, paged: bool = False
) -> PrefillLaunch:
    """The launch for a problem.

    Windows, block lists and shared tiles need registers for their masks, softcap and ALiBi for the
    scores, and tiles of 128 rows; varlen sequences and pages need registers in the producer.
    """
    dim, shared = problem.q.shape[3], sharing.splits > 1
    varlen = any(x is not None for x in (problem.cu_q, problem.kv_lens, problem.q_offsets))
    plain = problem.raw and problem.block_mask is None and problem.mask.window is None
    if paged or (varlen and not shared):
        launch = measured_launch(dim, "varlen")
    elif shared or not plain:
        launch = measured_launch(dim, "masked")
    else:
        launch = measured_launch(dim)
    if problem.block_mask is not None:
        return _over_blocks(problem, launch)
    if not shared:
        return launch
    return replace(launch, pack=sharing.pack, splits=sharing.splits, direct_store=True)


def _over_blocks(problem: Problem, launch: PrefillLaunch) -> PrefillLaunch:
    """A launch whose tiles lie in blocks of the selection, which the backend has accepted."""
    heads = heads_of_tile(problem.q_block, problem.q.shape[1] // problem.k.shape[1])
    parts = parts_of_tile(problem.k_block, launch.block_n)
    assert heads is not None and parts is not None
    direct = launch.direct_store or heads > 1
    return replace(launch, pack=heads, parts=parts, direct_store=direct)


def forward(
    problem: Problem,
    launch: PrefillLaunch | None = None,
    *,
    page_table: Tensor | None = None,
    out: Tensor | None = None,
) -> AttentionOutput:
    """Output and lse of a problem that the backend has accepted.

    Args:
        page_table: the pages of each row, where k and v of the problem are a pool of pages.
        out: where the output goes; default a contiguous tensor.
    """
    q, v = problem.q, problem.v
    if launch is None:
        sharing = sharing_of(problem, FEW_ROWS, multiprocessors(q.device))
        launch = launch_of(problem, sharing, paged=page_table is not None)
    if launch.splits > 1:
        partials = SplitKVPartials(problem, launch.splits)
        strides = partials.out.stride(0), partials.lse.stride(0)
        _launch(problem, launch, page_table, partials.out[0], partials.lse[0], strides)
        return partials.combine(q.dtype)
    if out is None:
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _launch(problem, launch, page_table, out, lse)
    return AttentionOutput(out, lse)


def _launch(
    problem: Problem,
    launch: PrefillLaunch,
    page_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    split_strides: tuple[int, int] = (0, 0),
) -> None:
    """Launch the kernel; out and lse are of the first split, the others `split_strides` further."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    varlen, num_q_tiles = varlen_info(problem, launch, page_table)
    num_work_tiles = num_q_tiles * launch.splits * batch * heads // launch.pack
    score_args = score_args_of(problem)
    set_tma_allocator()
    with on(q.device):
        launch_kernel(
            forward_kernel,
            (min(num_work_tiles, multiprocessors(q.device)),),
            *(tma_strided(x) for x in (q, k, v, out)),
            lse,
            score_args.sink_logits,
            score_args.softcap,
            score_args.alibi_slopes,
            score_args.alibi_slopes_batch,
            # A tile lies in one block of a selection: block lists replace its element-wise mask.
            mask_args_of(problem.without_blocks()),
            block_lists_of(problem, num_q_tiles, launch.block_m, launch.block_n // launch.parts),
            varlen,
            score_args.scale,
            q_len,
            problem.num_keys,
            problem.q_offset,
            batch,
            heads,
            heads // k.shape[1],
            num_q_tiles * launch.splits,
            heads_per_section(problem, launch.l2_bytes) // launch.pack,
            num_work_tiles,
            k.shape[0],
            launch.splits,
            *split_strides,
            CAUSAL=problem.mask.causal,
            DIM=dim,
            V_DIM=v.shape[3],
            D=tile_dim(dim),
            DV=tile_dim(v.shape[3]),
            ZERO_V_TAIL=varlen.q_tiles is not None or varlen.kv_lens is not None,
            PAGE_SIZE=None if page_table is None else k.shape[2],
            **constants(launch),
            **options(launch.consumers),
        )


def varlen_info(
    problem: Problem, launch: PrefillLaunch, page_table: Tensor | None
) -> tuple[VarlenInfo, int]:
    """What differs from sequence to sequence, and the number of query tiles of a row."""
    kv_lens, num_q_tiles = problem.kv_lens, cdiv(problem.q.shape[2], launch.block_m)
    q_tiles = None
    if problem.cu_q is not None:
        q_tiles = varlen_q_tiles(problem, launch.block_m)
        num_q_tiles = len(q_tiles)
    varlen = VarlenInfo(
        problem.q_offsets,
        kv_lens,
        None if kv_lens is None else kv_lens.stride(0),
        q_tiles,
        page_table,
        None if page_table is None else page_table.stride(0),
    )
    return varlen, num_q_tiles


def constants(launch: PrefillLaunch) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel that a launch decides."""
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "CONSUMERS": launch.consumers,
        "Q_STAGES": launch.q_stages,
        "K_STAGES": launch.k_stages,
        "V_STAGES": launch.v_stages,
        "PINGPONG": launch.pingpong,
        "DIRECT_STORE": launch.direct_store,
        "REGISTERS": launch.registers,
        "PACK": launch.pack,
        "SPLIT_KV": launch.splits > 1,
        "PARTS": launch.parts,
    }


def options(consumers: int) -> dict[str, int]:
    """Compiler options of a kernel with one CTA per multiprocessor, by its number of consumers.

    A thread starts with an equal share of registers; setmaxnreg then moves them to the consumers.
    """
    return {"num_warps": 4, "maxnreg": REGISTERS_PER_LANE // (consumers + 1) // 8 * 8}


def heads_per_section(problem: Problem, l2_bytes: int) -> int:
    """Query heads that are computed together: as many as read K and V of at most `l2_bytes`."""
    batch, kv_heads, dim = problem.q.shape[0], problem.k.shape[1], problem.k.shape[3]
    k_len = problem.num_keys
    reach = k_len if problem.mask.window is None else min(k_len, problem.mask.window + 4096)
    fitting = max(1, l2_bytes // (2 * reach * dim * problem.k.element_size()))
    kv_rows = batch * kv_heads
    section = next(n for n in range(min(fitting, kv_rows), 0, -1) if kv_rows % n == 0)
    return section * (problem.q.shape[1] // kv_heads)
