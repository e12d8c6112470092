"""Block-sparse index lists: from a BlockSelection to the tiles that each program computes.

Blocks and tiles may have any sizes: a summed-area table counts the selected blocks under a tile.
A tile without any is skipped; one whose blocks are all selected and which the Mask does not cut is
full and needs no mask.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core import KeyRange
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.kernel_args import BlockLists
from saccade.ops.gpu.launching import on
from saccade.ops.gpu.replay import launch_kernel

SMALLEST = 8  # keys of a block: `step_list_kernel` reads all blocks under a tile


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
    if problem.block_mask is None:
        return BlockLists()
    keys = keys or KeyRange(0, problem.num_keys)
    if tiles == 1 and not by_keys and _is_step(problem):
        return _step_lists(problem, block_n, keys)
    first = torch.arange(0, tiles * block_m, block_m, device=problem.q.device)
    same = (groups, block_m, block_n) == (1, problem.q_block, problem.k_block)
    same_tiles = same and keys.start == 0
    stop = (first + block_m - 1) // groups + 1
    classes = _tile_classes(problem, first // groups, stop, keys, block_n, same_tiles)
    lists, counts = _index_lists(classes.mT if by_keys else classes)
    batch, head = (0 if lists.shape[i] == 1 else lists.stride(i) for i in (0, 1))
    return BlockLists(lists, counts, batch, head, lists.shape[3])


def _is_step(problem: Problem) -> bool:
    """Whether the queries lie in one block, and causality alone cuts what is selected."""
    plain = problem.mask.causal and problem.mask.window is None and problem.cu_q is None
    return plain and problem.q.shape[2] <= problem.q_block and problem.k_block >= SMALLEST


def _step_lists(problem: Problem, block_n: int, keys: KeyRange) -> BlockLists:
    """Lists for one tile of queries, by one kernel; every tile counts as partial."""
    allowed, offsets = problem.block_mask, problem.q_offsets
    assert allowed is not None
    batch = allowed.shape[0] if offsets is None else problem.q.shape[0]
    heads, columns = allowed.shape[1], max(1, cdiv(keys.stop - keys.start, block_n))
    lists = torch.empty(batch, heads, 1, columns, dtype=torch.int32, device=allowed.device)
    counts = torch.empty(batch, heads, 1, 2, dtype=torch.int32, device=allowed.device)
    with on(allowed.device):
        launch_kernel(
            step_list_kernel,
            (batch * heads,),
            *_with_strides(allowed),
            lists,
            counts,
            problem.q_offset if offsets is None else offsets,
            problem.q.shape[2],
            heads,
            columns,
            keys.start,
            keys.stop,
            problem.k_block,
            block_n,
            allowed.shape[3],
            BLOCK=next_power_of_two(columns),
            COVERED=block_n // problem.k_block + 2,
            DEVICE_OFFSET=offsets is not None,
        )
    by_batch, by_head = 0 if batch == 1 else heads * columns, 0 if heads == 1 else columns
    return BlockLists(lists, counts, by_batch, by_head, columns)


def _with_strides(allowed: Tensor) -> tuple[Tensor, int, int, int]:
    """A grid as bytes, and its strides between rows of the batch, heads and columns."""
    batch, head = (0 if allowed.shape[i] == 1 else allowed.stride(i) for i in (0, 1))
    return allowed.view(torch.uint8), batch, head, allowed.stride(3)


def _index_lists(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Column indices of each row of classes `[.., rows, columns]`, and (full, full + partial)."""
    classes = classes.contiguous()
    lists = torch.empty(classes.shape, dtype=torch.int32, device=classes.device)
    counts = torch.empty(*classes.shape[:-1], 2, dtype=torch.int32, device=classes.device)
    columns = classes.shape[-1]
    with on(classes.device):
        launch_kernel(
            index_list_kernel,
            (classes.numel() // columns,),
            classes,
            lists,
            counts,
            columns,
            BLOCK=next_power_of_two(columns),
        )
    return lists, counts


@triton.jit
def index_list_kernel(classes, lists, counts, columns, BLOCK: tl.constexpr):
    """Column indices of one row of classes: full tiles first, then partial ones, then skipped."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < columns
    kind = tl.load(classes + row * columns + column, mask=valid, other=0).to(tl.int32)
    full, partial = (kind == 2).to(tl.int32), (kind == 1).to(tl.int32)
    num_full, num_partial = tl.sum(full, 0), tl.sum(partial, 0)
    full_before, partial_before = tl.cumsum(full, 0) - full, tl.cumsum(partial, 0) - partial
    place = num_full + num_partial + column - full_before - partial_before
    place = tl.where(kind == 1, num_full + partial_before, place)
    place = tl.where(kind == 2, full_before, place)
    tl.store(lists + row * columns + place, column, mask=valid)
    tl.store(counts + 2 * row, num_full)
    tl.store(counts + 2 * row + 1, num_full + num_partial)


@triton.jit(do_not_specialize=["q_offset", "q_len", "columns", "start", "stop", "num_blocks"])
def step_list_kernel(
    allowed, batch_stride, head_stride, column_stride, lists, counts, q_offset, q_len, heads,
    columns, start, stop, k_block, block_n, num_blocks,
    BLOCK: tl.constexpr, COVERED: tl.constexpr, DEVICE_OFFSET: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that one row and KV head reads, in order; none is full.

    COVERED: blocks that a tile may lie in, at most.
    """
    row = tl.program_id(0)
    b, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    offset = q_offset
    if DEVICE_OFFSET:
        offset = tl.load(q_offset + b).to(tl.int32)
    column = tl.arange(0, BLOCK)
    first = start + column * block_n
    last = tl.minimum(tl.minimum(first + block_n, stop), offset + q_len) - 1  # keys of the tile
    grid = allowed + b * batch_stride + head * head_stride
    found = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(COVERED):
        block = first // k_block + i
        inside = (column < columns) & (block <= last // k_block) & (block < num_blocks)
        inside = inside & (last >= first)
        at = grid + block.to(tl.int64) * column_stride
        found = found | tl.load(at, mask=inside, other=0).to(tl.int32)
    found = (found != 0).to(tl.int32)
    place = tl.cumsum(found, 0) - found
    to = lists + row.to(tl.int64) * columns + place
    tl.store(to, column, mask=found != 0)
    both = tl.arange(0, 2)
    tl.store(counts + 2 * row + both, tl.where(both == 0, 0, tl.sum(found, 0)))


def _tile_classes(
    problem: Problem,
    first_q: Tensor,
    stop_q: Tensor,
    keys: KeyRange,
    block_n: int,
    same_tiles: bool,
) -> Tensor:
    """0 skipped, 1 partial, 2 full: uint8 `[B | 1, Hkv | 1, q tiles, k tiles]`."""
    q_len, k_len = problem.q.shape[2], keys.stop
    device = problem.q.device
    q0, q1 = first_q[:, None], stop_q.clamp(max=q_len)[:, None]
    end = max(k_len, keys.start + 1)
    k0 = torch.arange(keys.start, end, block_n, device=device)[None]
    k1 = (k0 + block_n).clamp(max=end)
    visited, selected = _coverage(problem, q0, q1, k0, k1, same_tiles)
    first, last = _positions(problem, q0), _positions(problem, q1 - 1)
    full = (stop_q[:, None] <= q_len) & (k0 + block_n <= k_len)
    if problem.mask.causal:
        visited = visited & (k0 <= last)
        full = full & (k1 - 1 <= first)
    if problem.mask.window is not None:
        visited = visited & ((k1 - 1 > first - problem.mask.window) | (k0 < problem.mask.sinks))
        full = full & ((k0 > last - problem.mask.window) | (k1 <= problem.mask.sinks))
    if problem.kv_lens is not None:
        full = full & (k0 + block_n <= problem.kv_lens.view(-1, 1, 1, 1))
    if problem.call.key_padding is not None or problem.call.attn_mask is not None:
        full = torch.zeros_like(full)
    return visited.to(torch.uint8) + (visited & selected & full)


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
        same_tiles: blocks have the size of tiles, so there is nothing to count.
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
