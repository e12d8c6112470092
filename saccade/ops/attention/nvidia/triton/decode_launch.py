"""Launcher of the split-KV kernel over full-precision keys: contiguous, in a ring or in pages.

Keys of more than MAX_PIECE channels, and those whose first channels are the values, are cut into
two pieces; they have launches of their own.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from saccade.core import AttentionOutput, KeyRange, PagedKV, Span
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.decode import decode_kernel
from saccade.ops.attention.nvidia.triton.launch import (
    compile_options,
    constants,
    mask_args_of,
    score_args_of,
    seqlen_info_of,
)
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.kernel_args import MAX_SPANS, BlockLists, PageTable, StridedTensor
from saccade.ops.gpu.launching import pdl_options, strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import tables as tuning

MAX_PIECE, MAX_REST = 512, 64  # channels of the pieces that keys are cut into
FEW_ROWS = 16  # of a KV head: one tile for tensor cores that multiply 16 rows
FEW_SLOTS = 256  # sooner read, blocks that are not selected too, than listed by a kernel before
ROWS_A_KEY = 32
"""Rows of a split's output that are written and read again in the time that one row tile takes for
a key (estimated, not measured): more splits shorten the reading of keys by less than they add."""


class RowTiling(NamedTuple):
    """How the rows of a KV head, which are queries times heads of its group, are cut into tiles.

    Attributes:
        launch: the kernel's configuration; block_m: rows of a tile; tiles: number of tiles.
        latent: whether keys are read as those of latent attention are.
    """

    launch: tuning.Launch
    block_m: int
    tiles: int
    latent: bool = False


class KeyPieces(NamedTuple):
    """How the channels of keys are cut.

    Attributes:
        dim, rest: channels of the first piece and of the second; holds_values: whether the first
            piece is the values too, in the same memory.
    """

    dim: int
    rest: int
    holds_values: bool

    @property
    def latent(self) -> bool:
        """Whether keys are read as those of latent attention are."""
        return self.rest > 0 or self.holds_values


def key_pieces(k: Tensor, v: Tensor) -> KeyPieces:
    """The pieces of keys in the storage `k`, whose values are in `v`."""
    dim, value_dim = k.shape[-1], v.shape[-1]
    same = k.numel() > 0 and k.data_ptr() == v.data_ptr() and strided(k)[1:] == strided(v)[1:]
    if same and 0 <= dim - value_dim <= MAX_REST and k.stride(-1) == v.stride(-1) == 1:
        return KeyPieces(value_dim, dim - value_dim, holds_values=True)
    first = min(dim, MAX_PIECE)
    return KeyPieces(first, dim - first, holds_values=False)


def page_table_of(kv: PagedKV) -> PageTable:
    """The page table of a view whose KV heads share their pages."""
    return PageTable(kv.page_table, kv.page_table.stride(0), 0, kv.k.stride(0), kv.v.stride(0))


def flat_spans(spans: tuple[Span, ...]) -> tuple[int, ...]:
    """(slot, position, length) of MAX_SPANS spans, padded with empty ones: one kernel for all."""
    padded = (*spans, *(Span(0, 0, 0),) * (MAX_SPANS - len(spans)))
    return tuple(number for span in padded for number in span)


def empty_output(problem: Problem) -> AttentionOutput:
    """The output of a problem without queries."""
    return SplitKVPartials(problem, 1).combine(problem.q.dtype)


def row_tiling(problem: Problem, heads: int, table: tuning.Kernel) -> RowTiling:
    """The tiling of a problem over `heads` KV heads by a kernel of the tuning tables."""
    launch = tuning.pick(table, problem.q, max(problem.q.shape[-1], problem.v.shape[-1]))
    rows = _rows(problem, heads)
    block_m = min(max(16, next_power_of_two(rows)), launch.block_m)
    return RowTiling(launch, block_m, cdiv(rows, block_m))


def stored_tiling(problem: Problem, pages: PageTable) -> RowTiling:
    """The tiling of a problem over keys that are stored so.

    Stages of a latent launch count tiles in flight.  A page's number is loaded two stages before
    its keys, and values of memory of their own take as much as keys.
    """
    heads, pieces = kv_heads(problem, pages), key_pieces(problem.k, problem.v)
    if not pieces.latent:
        return row_tiling(problem, heads, tuning_table(pages))
    rows = _rows(problem, heads)
    table = tuning.DECODE_LATENT if rows <= FEW_ROWS else tuning.DECODE_LATENT_ROWS
    launch = tuning.pick(table, problem.q, pieces.dim)
    stages = launch.stages if pieces.holds_values else cdiv(launch.stages, 2)
    stages += 0 if pages.table is None else 2
    tiles = cdiv(rows, launch.block_m)
    return RowTiling(replace(launch, stages=stages), launch.block_m, tiles, latent=True)


def _rows(problem: Problem, heads: int) -> int:
    """Queries times heads of a group."""
    return problem.q.shape[1] // heads * problem.q.shape[2]


def num_splits(problem: Problem, heads: int, slots: int, tiling: RowTiling) -> int:
    """How many programs share the keys of a row tile: as many as fill the GPU and have work."""
    launch = tiling.launch
    reach, mask = slots, problem.mask
    if mask.window is not None:
        reach = min(slots, mask.window + problem.q.shape[2] + mask.sinks + launch.block_n)
    programs = problem.q.shape[0] * heads * tiling.tiles
    wanted = launch.per_sm * multiprocessors(problem.q.device)
    most = cdiv(reach, launch.block_n)
    if tiling.latent:
        most = min(most, math.isqrt(ROWS_A_KEY * reach // max(1, _rows(problem, heads))))
    return max(1, min(wanted // max(programs, 1), most))


def decode_into(
    partials: SplitKVPartials,
    problem: Problem,
    pages: PageTable,
    spans: tuple[int, ...] | None,
    slots: int,
    *,
    first: int,
    splits: int,
    origin: Tensor | None = None,
) -> None:
    """Compute the splits first .. first + splits - 1 of `partials` over full-precision keys."""
    (batch, q_heads, q_len), heads = problem.q.shape[:3], kv_heads(problem, pages)
    launch, block_m, row_tiles, _ = stored_tiling(problem, pages)
    groups = q_heads // heads
    seqlen_info = seqlen_info_of(problem, block_m, by_keys=False)[0]._replace(origin=origin)
    launch_kernel(
        decode_kernel,
        (splits * row_tiles, batch * heads),
        strided(problem.q),
        strided_storage(problem.k, pages),
        strided_storage(problem.v, pages),
        strided(partials.out[first]),
        partials.lse[first],
        pages,
        spans,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        _block_lists(problem, spans, row_tiles, block_m, launch.block_n, groups),
        q_len,
        slots if pages.positions is not None else problem.num_keys,
        slots,
        problem.q_offset,
        splits,
        partials.out.stride(0),
        partials.lse.stride(0),
        heads,
        groups,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        PAGE=_page_size(problem.k, pages),
        **_piece_constants(problem),
        **pdl_options(problem.q.device),
        **compile_options(launch),
    )


def _piece_constants(problem: Problem) -> dict[str, int | bool | str]:
    """Compile-time constants of a problem, its keys cut into pieces."""
    dim, rest, holds_values = key_pieces(problem.k, problem.v)
    piece = {"HEAD_DIM": dim, "BLOCK_D": max(16, next_power_of_two(dim))}
    return constants(problem) | piece | {"REST": rest, "V_IN_K": holds_values}


def _block_lists(
    problem: Problem,
    spans: tuple[int, ...] | None,
    tiles: int,
    block_m: int,
    block_n: int,
    groups: int,
) -> BlockLists:
    """Lists of tiles of slots, which are positions only where the storage has no spans.

    Over several spans, or few slots, there are none: all slots are read, and the mask leaves out
    blocks.
    """
    keys = None
    if spans is not None:
        slot, position, length = spans[:3]
        if slot or any(spans[5::3]) or length <= FEW_SLOTS:
            return BlockLists()
        keys = KeyRange(position, position + length)
    return block_lists_of(problem, tiles, block_m, block_n, groups=groups, keys=keys)


def strided_storage(x: Tensor, pages: PageTable) -> StridedTensor:
    """Pointer and strides of storage: pages have no batch, and those of a ragged view no heads."""
    if pages.table is None:
        return strided(x)
    if pages.positions is None:
        return StridedTensor(x, 0, x.stride(1), x.stride(2))
    return StridedTensor(x, 0, 0, x.stride(1))


def kv_heads(problem: Problem, pages: PageTable) -> int:
    """KV heads of the storage; a ragged view's pages belong to one head each, so its table says."""
    return problem.k.shape[1] if pages.positions is None else pages.table.shape[1]


def tuning_table(pages: PageTable) -> tuning.Kernel:
    """The tuning table for keys that are stored so."""
    return tuning.DECODE if pages.table is None else tuning.DECODE_PAGED


def _page_size(x: Tensor, pages: PageTable) -> int:
    """Slots of a page, 1 without pages."""
    if pages.table is None:
        return 1
    return x.shape[2] if pages.positions is None else x.shape[1]
