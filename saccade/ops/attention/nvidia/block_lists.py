"""Block-sparse index lists: from a BlockSelection to the tiles that each program computes.

Blocks and tiles may have any sizes.  A tile without a selected block is skipped; one whose blocks
are all selected and which the Mask does not cut is full and needs no mask.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saccade.core import KeyRange
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import cdiv, lanes_of
from saccade.ops.gpu.kernel_args import BlockLists
from saccade.ops.gpu.launching import on, pdl_options, strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.triton_lang import pdl_begin

COLUMNS_OF_A_WARP = 256


def block_lists_of(
    problem: Problem,
    tiles: int,
    block_m: int,
    block_n: int,
    *,
    groups: int = 1,
    by_keys: bool = False,
    keys: KeyRange | None = None,
) -> BlockLists:
    """Lists of key tiles for each query tile (by_keys: of query tiles for each key tile).

    Args:
        tiles: number of query tiles; tile t covers rows t * block_m onwards, and row r is query
            r // groups.
        block_n: keys of a key tile.
        keys: positions that the kernel reads, tile 0 from the first of them on; default all.
    """
    allowed, offsets, kv_lens = problem.block_mask, problem.q_offsets, problem.kv_lens
    if allowed is None:
        return BlockLists()
    keys = keys or KeyRange(0, problem.num_keys)
    key_tiles = max(1, cdiv(keys.stop - keys.start, block_n))
    rows, columns = (key_tiles, tiles) if by_keys else (tiles, key_tiles)
    shared = offsets is None and kv_lens is None
    batch, heads = allowed.shape[0] if shared else problem.q.shape[0], allowed.shape[1]
    lists = torch.empty(batch, heads, rows, columns, dtype=torch.int32, device=allowed.device)
    counts = torch.empty(batch, heads, rows, 2, dtype=torch.int32, device=allowed.device)
    block, call = lanes_of(columns), problem.call
    with on(allowed.device):
        launch_kernel(
            tile_list_kernel,
            (rows, batch * heads),
            strided(allowed.expand(batch, -1, -1, -1).view(torch.uint8)),
            allowed.stride(3),
            lists,
            counts,
            problem.q_offset if offsets is None else offsets,
            kv_lens,
            None if kv_lens is None else kv_lens.stride(0),
            problem.q.shape[2],
            keys.start,
            keys.stop,
            columns,
            heads,
            groups,
            problem.q_block,
            problem.k_block,
            allowed.shape[3],
            problem.mask.window,
            problem.mask.sinks,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK=block,
            Q_COVERED=_covered(block_m, groups * problem.q_block),
            K_COVERED=_covered(block_n, problem.k_block, keys.start),
            DEVICE_OFFSET=offsets is not None,
            CAUSAL=problem.mask.causal,
            CUT=call.key_padding is not None or call.attn_mask is not None,
            BY_KEYS=by_keys,
            num_warps=min(16, block // COLUMNS_OF_A_WARP),
            **pdl_options(allowed.device),
        )
    by_batch, by_head = (0 if x == 1 else lists.stride(i) for i, x in enumerate((batch, heads)))
    return BlockLists(lists, counts, by_batch, by_head, columns)


def _covered(tile: int, block: int, start: int = 0) -> int:
    """How many blocks a tile lies in at most; tiles begin `start` after multiples of their size."""
    aligned = (tile % block == 0 or block % tile == 0) and start % min(tile, block) == 0
    return cdiv(tile, block) + (0 if aligned else 1)


@triton.jit(do_not_specialize=["q_offset", "q_len", "start", "stop", "columns", "num_blocks"])
def tile_list_kernel(
    allowed, column_stride, lists, counts, q_offset, kv_lens, kv_lens_stride, q_len, start, stop,
    columns, heads, groups, q_block, k_block, num_blocks, window, sinks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, Q_COVERED: tl.constexpr,
    K_COVERED: tl.constexpr, DEVICE_OFFSET: tl.constexpr, CAUSAL: tl.constexpr, CUT: tl.constexpr,
    BY_KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of lists: indices of full tiles, of partial ones, of those to skip; and the counts.

    Args:
        allowed: the selection as a StridedTensor of bytes with `column_stride`.
        Q_COVERED, K_COVERED: blocks that a tile lies in, at most.
        CUT: no tile is full.
        BY_KEYS: the row is a tile of keys and lists tiles of queries.
    """
    pdl_begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1) % heads
    b = tl.program_id(1) // heads
    column = tl.arange(0, BLOCK)
    if BY_KEYS:
        q_tile, k_tile = column, row
    else:
        q_tile, k_tile = row, column
    first_q = q_tile * BLOCK_M // groups
    stop_q = (q_tile * BLOCK_M + BLOCK_M - 1) // groups + 1
    last_q = tl.minimum(stop_q, q_len) - 1
    first_k = start + k_tile * BLOCK_N
    last_k = tl.minimum(first_k + BLOCK_N, stop) - 1
    offset, k_len = q_offset, stop
    if DEVICE_OFFSET:
        offset = tl.load(q_offset + b).to(tl.int32)
    if kv_lens is not None:
        k_len = tl.minimum(stop, tl.load(kv_lens + b * kv_lens_stride).to(tl.int32))

    grid = allowed.ptr + b.to(tl.int64) * allowed.batch + head.to(tl.int64) * allowed.head
    some, every = column < columns, column < columns
    found = column < 0
    for i in range(Q_COVERED):
        q_at = first_q // q_block + i
        for j in range(K_COVERED):
            k_at = first_k // k_block + j
            covered = (q_at <= last_q // q_block) & (k_at <= last_k // k_block)
            inside = some & covered & (k_at < num_blocks)
            at = grid + q_at.to(tl.int64) * allowed.row + k_at.to(tl.int64) * column_stride
            here = tl.load(at + tl.zeros_like(column), mask=inside, other=0) != 0
            found = found | here
            every = every & (here | (covered == 0))
    visited = found & (first_k < k_len) & (first_q < q_len)
    full = every & (stop_q <= q_len) & (first_k + BLOCK_N <= k_len)
    if CAUSAL:
        visited = visited & (first_k <= last_q + offset)
        full = full & (last_k <= first_q + offset)
    if window is not None:
        near = (last_k > first_q + offset - window) | (first_k < sinks)
        visited = visited & near
        full = full & ((first_k > last_q + offset - window) | (last_k < sinks))
    if CUT:
        full = full & (column < 0)

    whole = (visited & full).to(tl.int32)
    partial = visited.to(tl.int32) - whole
    num_full, num_partial = tl.sum(whole, 0), tl.sum(partial, 0)
    whole_before, partial_before = tl.cumsum(whole, 0) - whole, tl.cumsum(partial, 0) - partial
    place = num_full + num_partial + column - whole_before - partial_before
    place = tl.where(partial != 0, num_full + partial_before, place)
    place = tl.where(whole != 0, whole_before, place)
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row
    tl.store(lists + line * columns + place, column, mask=column < columns)
    both = tl.arange(0, 2)
    tl.store(counts + 2 * line + both, num_full + tl.where(both == 0, 0, num_partial))
