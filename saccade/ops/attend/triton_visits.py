"""From a BlockSelection to lists of tiles: what a program of a kernel has to visit.

Blocks of any size are laid over tiles of any size with a summed-area table, so a tile is skipped
where none of its blocks is selected, and needs no mask where all of them are and the Mask agrees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attend.triton_problem import Problem
from saccade.ops.tiles import Visits


def visits_of(
    problem: Problem,
    tiles: int,
    block_m: int,
    k_block: int,
    *,
    groups: int = 1,
    by_keys: bool = False,
) -> Visits:
    """Lists of key tiles for each query tile (by_keys: of query tiles for each key tile).

    Args:
        tiles: number of query tiles; tile t holds rows t * block_m onwards, and row r is query
            r // groups.
        k_block: keys of a key tile.
    """
    if problem.allowed is None:
        return Visits()
    first = torch.arange(0, tiles * block_m, block_m, device=problem.q.device)
    grid = _classes(problem, first // groups, (first + block_m - 1) // groups + 1, k_block)
    if by_keys:
        grid = grid.mT
    order = torch.sort(grid, dim=-1, descending=True, stable=True).indices.to(torch.int32)
    counts = torch.stack(((grid == 2).sum(-1), (grid > 0).sum(-1)), -1).to(torch.int32)
    order = order.contiguous()
    batch, head = (0 if order.shape[i] == 1 else order.stride(i) for i in (0, 1))
    return Visits(order, counts.contiguous(), batch, head, order.shape[3])


def _classes(problem: Problem, first_q: Tensor, stop_q: Tensor, k_block: int) -> Tensor:
    """0 skip, 1 visit with a mask, 2 visit whole: uint8 `[B | 1, Hkv | 1, q tiles, k tiles]`."""
    q_len, k_len = problem.q.shape[2], problem.num_keys
    device = problem.q.device
    q0, q1 = first_q[:, None], stop_q.clamp(max=q_len)[:, None]
    k0 = torch.arange(0, max(k_len, 1), k_block, device=device)[None]
    k1 = (k0 + k_block).clamp(max=max(k_len, 1))
    touched, filled = _coverage(problem, q0, q1, k0, k1)
    first, last = _positions(problem, q0), _positions(problem, q1 - 1)
    whole = (stop_q[:, None] <= q_len) & (k0 + k_block <= k_len)
    if problem.causal:
        touched = touched & (k0 <= last)
        whole = whole & (k1 - 1 <= first)
    if problem.window is not None:
        touched = touched & ((k1 - 1 > first - problem.window) | (k0 < problem.sinks))
        whole = whole & ((k0 > last - problem.window) | (k1 <= problem.sinks))
    if problem.lengths is not None:
        whole = whole & (k0 + k_block <= problem.lengths.view(-1, 1, 1, 1))
    if problem.padding is not None or problem.foreign is not None:
        whole = torch.zeros_like(whole)
    return touched.to(torch.uint8) + (touched & filled & whole)


def _positions(problem: Problem, index: Tensor) -> Tensor:
    """Positions of queries, `[1 | B, 1, q tiles, 1]`."""
    if problem.offsets is not None:
        return index[None, None] + problem.offsets.view(-1, 1, 1, 1)
    return (index + problem.q_offset)[None, None]


def _coverage(
    problem: Problem, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every, block under a tile is selected."""
    allowed = problem.allowed
    assert allowed is not None
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
