"""From a BlockSelection to lists of tiles: what a program of a kernel has to visit.

Blocks of any size are laid over tiles of any size with a summed-area table, so a tile is skipped
where none of its blocks is selected, and needs no mask where all of them are and the Mask agrees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import power_of_two
from saccade.ops.gpu.kernel_args import BlockLists
from saccade.ops.gpu.launching import on


def block_lists_of(
    problem: Problem,
    tiles: int,
    block_m: int,
    k_block: int,
    *,
    groups: int = 1,
    by_keys: bool = False,
) -> BlockLists:
    """Lists of key tiles for each query tile (by_keys: of query tiles for each key tile).

    Args:
        tiles: number of query tiles; tile t holds rows t * block_m onwards, and row r is query
            r // groups.
        k_block: keys of a key tile.
    """
    if problem.block_mask is None:
        return BlockLists()
    first = torch.arange(0, tiles * block_m, block_m, device=problem.q.device)
    same = groups == 1 and (block_m, k_block) == (problem.q_block, problem.k_block)
    grid = _classes(problem, first // groups, (first + block_m - 1) // groups + 1, k_block, same)
    if by_keys:
        grid = grid.mT
    order, counts = _listed(grid)
    batch, head = (0 if order.shape[i] == 1 else order.stride(i) for i in (0, 1))
    return BlockLists(order, counts, batch, head, order.shape[3])


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row of classes `[.., rows, columns]`, whole tiles first, and how many."""
    grid = grid.contiguous()
    order = torch.empty(grid.shape, dtype=torch.int32, device=grid.device)
    counts = torch.empty(*grid.shape[:-1], 2, dtype=torch.int32, device=grid.device)
    rows, columns = grid.numel() // grid.shape[-1], grid.shape[-1]
    with on(grid.device):
        list_kernel[(rows,)](grid, order, counts, columns, BLOCK=power_of_two(columns))
    return order, counts


@triton.jit
def list_kernel(grid, order, counts, columns, BLOCK: tl.constexpr):
    """One row of classes as a list of columns: whole tiles, those with holes, the others."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < columns
    kind = tl.load(grid + row * columns + column, mask=there, other=0).to(tl.int32)
    whole, holes = (kind == 2).to(tl.int32), (kind == 1).to(tl.int32)
    num_whole, num_holes = tl.sum(whole, 0), tl.sum(holes, 0)
    before_whole, before_holes = tl.cumsum(whole, 0) - whole, tl.cumsum(holes, 0) - holes
    place = num_whole + num_holes + column - before_whole - before_holes
    place = tl.where(kind == 1, num_whole + before_holes, place)
    place = tl.where(kind == 2, before_whole, place)
    tl.store(order + row * columns + place, column, mask=there)
    tl.store(counts + 2 * row, num_whole)
    tl.store(counts + 2 * row + 1, num_whole + num_holes)


def _classes(
    problem: Problem, first_q: Tensor, stop_q: Tensor, k_block: int, same_tiles: bool
) -> Tensor:
    """0 skip, 1 visit with a mask, 2 visit whole: uint8 `[B | 1, Hkv | 1, q tiles, k tiles]`."""
    q_len, k_len = problem.q.shape[2], problem.num_keys
    device = problem.q.device
    q0, q1 = first_q[:, None], stop_q.clamp(max=q_len)[:, None]
    k0 = torch.arange(0, max(k_len, 1), k_block, device=device)[None]
    k1 = (k0 + k_block).clamp(max=max(k_len, 1))
    touched, filled = _coverage(problem, q0, q1, k0, k1, same_tiles)
    first, last = _positions(problem, q0), _positions(problem, q1 - 1)
    whole = (stop_q[:, None] <= q_len) & (k0 + k_block <= k_len)
    if problem.causal:
        touched = touched & (k0 <= last)
        whole = whole & (k1 - 1 <= first)
    if problem.window is not None:
        touched = touched & ((k1 - 1 > first - problem.window) | (k0 < problem.sinks))
        whole = whole & ((k0 > last - problem.window) | (k1 <= problem.sinks))
    if problem.kv_lens is not None:
        whole = whole & (k0 + k_block <= problem.kv_lens.view(-1, 1, 1, 1))
    if problem.key_padding is not None or problem.attn_mask is not None:
        whole = torch.zeros_like(whole)
    return touched.to(torch.uint8) + (touched & filled & whole)


def _positions(problem: Problem, index: Tensor) -> Tensor:
    """Positions of queries, `[1 | B, 1, q tiles, 1]`."""
    if problem.q_offsets is not None:
        return index[None, None] + problem.q_offsets.view(-1, 1, 1, 1)
    return (index + problem.q_offset)[None, None]


def _coverage(
    problem: Problem, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, same_tiles: bool
) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every, block under a tile is selected.

    Args:
        same_tiles: blocks are tiles.
    """
    allowed = problem.block_mask
    assert allowed is not None
    rows, columns = len(q0), k0.shape[1]
    if same_tiles:
        found = allowed[:, :, :rows, :columns]
        return found, found
    table = allowed.to(torch.int32).cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)
    table = torch.nn.functional.pad(table, (1, 0, 1, 0))
    top, bottom = q0 // problem.q_block, (q1 - 1) // problem.q_block + 1
    left, right = k0 // problem.k_block, (k1 - 1) // problem.k_block + 1
    right, bottom = right.clamp(max=allowed.shape[3]), bottom.clamp(max=allowed.shape[2])
    left, top = torch.minimum(left, right), torch.minimum(top, bottom)
    count = (
        table[:, :, bottom, right]
        - table[:, :, top, right]
        - table[:, :, bottom, left]
        + table[:, :, top, left]
    )
    return count > 0, count == (bottom - top) * (right - left)
