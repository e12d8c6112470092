"""Selections of a decoding step by Triton's kernels, and the lists that are made of them.

As test_triton.py: on a GPU, or in the interpreter that it starts.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import BlockSelection, DenseKV, KeyRange, Mask
from saccade.ops import make_call
from saccade.ops.attention.nvidia import block_lists
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.selection import BlockRule, gpu
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.sparse.test_selection import draw, expected, rows_of

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too


@runs_kernels
@pytest.mark.parametrize("summary", ["mean", "bounds"])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("q_len", "past", "options"),
    [
        (1, 95, {}),
        (3, 95, {"window": 1, "sinks": 0}),
        (1, 60, {"stride": 3}),
        (1, 90, {"top": 0}),
        (1, 90, {"top": 99}),
        (1, 90, {"least": 91}),
        (1, 90, {"least": 92}),
    ],
)
def test_kernels_select_what_the_formula_says(summary, on_device, q_len, past, options):
    """Rows behind the blocks before the queries may hold anything."""
    known = {"summary": summary, "q_block": 8, "k_block": 8, "sinks": 1, "window": 2, "top": 3}
    rule = BlockRule(**(known | options))
    q, k = draw(q_len, past + q_len)
    rows, blocks = rows_of(rule, k), -(-(past + q_len) // 8)
    if on_device:
        rows = torch.cat((rows[:, :, : past // 8], torch.full_like(rows, torch.nan)), dim=2)
        blocks += 5
    at = torch.tensor([past, past], device=DEVICE)[0] if on_device else past
    assert gpu.suits(rule, q, rows, blocks)
    found = gpu.select(rule, q.to(DEVICE), rows.to(DEVICE), at, blocks).cpu()
    truth = expected(rule, q, k, past)
    if past + q_len < rule.least:
        truth = torch.ones_like(truth)
    assert torch.equal(found[..., : truth.shape[3]], truth)
    assert not found[..., truth.shape[3] :].any()


@runs_kernels
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("k_block", "block_n", "keys"),
    [
        (16, 16, (0, 200)),
        (24, 16, (0, 200)),
        (8, 32, (0, 200)),
        (16, 32, (64, 200)),
        (16, 16, (0, 0)),
    ],
)
def test_lists_hold_the_tiles_with_a_selected_key(on_device, k_block, block_n, keys):
    q, k = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 200, 16)
    allowed = torch.rand(2, 2, 1, -(-200 // k_block)) > 0.7
    selection = BlockSelection(allowed=allowed.to(DEVICE), q_block=8, k_block=k_block)
    positions = torch.tensor([150, 90])
    at = positions.to(DEVICE) if on_device else 150
    q, k = q.to(DEVICE), k.to(DEVICE)
    problem = dense_problem(make_call(q, DenseKV(k, k), mask=Mask(), blocks=selection, q_offset=at))
    found = block_lists.block_lists_of(problem, 1, 16, block_n, groups=2, keys=KeyRange(*keys))
    for b in range(2):
        for head in range(2):
            last = (int(positions[b]) if on_device else 150) + 1
            seen = allowed[b, head, 0].repeat_interleave(k_block)[:200]
            seen = seen & (torch.arange(200) <= last)
            starts = range(keys[0], keys[1], block_n)
            wanted = [j for j, n in enumerate(starts) if seen[n : min(n + block_n, keys[1])].any()]
            full, count = found.counts[b, head, 0].tolist()
            assert full == 0 and found.tiles[b, head, 0, :count].tolist() == wanted
