"""Selections of a decoding step by Triton's kernels, and the lists that are made of them.

As test_triton.py: on a GPU, or in the interpreter that it starts.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import BlockSelection, DenseKV, KeyRange, Mask
from saccade.ops import make_call
from saccade.ops.attention.nvidia import block_lists
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.selection import BlockRule, gpu, select_blocks, summarize
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.sparse.test_selection import draw, expected, rows_of
from tests.support.gpu import on_gpu

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too


BY_SCORE = [
    (1, 95, {}),
    (3, 95, {"window": 1, "sinks": 0}),
    (1, 60, {"stride": 3}),
    (1, 90, {"top": 0}),
    (1, 90, {"top": 99}),
    (1, 90, {"least": 91}),
    (1, 90, {"least": 92}),
    (21, 75, {}),
    (40, 0, {"top": 1}),
]
BY_SHARE = [
    (16, 80, {"top": 0, "share": 0.6}),
    (1, 95, {"top": 0, "share": 0.9}),
    (9, 87, {"top": 0, "share": 1.0}),
]


@runs_kernels
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("summary", "q_len", "past", "options"),
    [("mean", *case) for case in BY_SCORE + BY_SHARE] + [("bounds", *case) for case in BY_SCORE],
)
def test_kernels_select_what_the_formula_says(summary, on_device, q_len, past, options):
    """Rows behind the blocks before the queries may hold anything."""
    usual = {"summary": summary, "q_block": 8, "k_block": 8, "sinks": 1, "window": 2, "top": 3}
    rule = BlockRule(**(usual | options))
    q, k = draw(q_len, past + q_len)
    rows, blocks = rows_of(rule, k), -(-(past + q_len) // 8)
    if on_device:
        known = (past + (q_len - 1) // 8 * 8) // 8
        rows = torch.cat((rows[:, :, :known], torch.full_like(rows, torch.nan)), dim=2)
        blocks += 5
    at = torch.tensor([past, past], device=DEVICE)[0] if on_device else past
    assert gpu.suits(rule, rows, blocks)
    found = gpu.select(rule, q.to(DEVICE), rows.to(DEVICE), at, blocks).cpu()
    truth = expected(rule, q, k, past)
    if past + q_len < rule.least:
        truth = torch.ones_like(truth)
    assert torch.equal(found[..., : truth.shape[3]], truth)
    assert not found[..., truth.shape[3] :].any()


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("summary", ["mean", "bounds"])
    @pytest.mark.parametrize("past", [8191, 70_000])
    def test_captured_steps_select_the_same_in_one_launch(self, summary, past):
        """Replayed for other queries and positions; three calls, whose counters are zeros again."""
        rule = BlockRule(summary=summary, q_block=32, k_block=32, sinks=1, window=2, top=20)
        rows = summarize(torch.randn(2, 2, past + 33, 64).cuda(), 32, summary)
        rows = torch.cat((rows, torch.full_like(rows[:, :, :1], torch.nan)), dim=2)
        q, at = torch.randn(3, 2, 8, 1, 64).cuda(), torch.tensor([past], device="cuda")
        blocks = rows.shape[2] + 3

        def work(offset):
            return [gpu.select(rule, each, rows, offset, blocks) for each in q]

        work(at[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = work(at[0])
        for position in range(past, past - 500, -37):
            q.normal_()
            at.fill_(position)
            graph.replay()
            known = rows[:, :, : position // 32]
            for each, captured, eager in zip(q, found, work(position), strict=True):
                truth = select_blocks(rule, each.cpu(), known.cpu(), position, position + 1).allowed
                chosen = captured.cpu()
                assert torch.equal(eager.cpu(), chosen)
                assert not chosen[..., truth.shape[3] :].any()
                assert (chosen.sum(-1) == truth.sum(-1)).all()
                # Scores that round differently may change places at the limit.
                assert (chosen[..., : truth.shape[3]] != truth).sum() <= 2


MASKS = [Mask(), Mask(causal=False), Mask(window=33, sinks=2)]


@runs_kernels
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("q_block", "k_block", "block_m", "block_n", "keys"),
    [
        (16, 16, 16, 16, (0, 90)),
        (8, 24, 16, 16, (0, 90)),
        (48, 8, 32, 32, (0, 90)),
        (16, 16, 16, 32, (24, 90)),
        (16, 16, 16, 16, (0, 0)),
    ],
)
@pytest.mark.parametrize("by_keys", [False, True])
def test_lists_hold_the_tiles_with_a_selected_key(
    on_device, q_block, k_block, block_m, block_n, keys, by_keys
):
    """Every tile with a visible pair is listed, and a full tile has only visible ones."""
    q_len, k_len, groups = 35, 90, 1 if by_keys else 2
    q, k = (torch.randn(2, heads, n, 16).to(DEVICE) for heads, n in ((4, q_len), (2, k_len)))
    allowed = torch.rand(2, 2, -(-q_len // q_block), -(-k_len // k_block)) > 0.4
    selection = BlockSelection(allowed=allowed.to(DEVICE), q_block=q_block, k_block=k_block)
    offsets = torch.tensor([50, 31] if on_device else [50, 50])
    lengths = torch.tensor([85, 66]).to(DEVICE) if on_device else None
    at, tiles = offsets.to(DEVICE) if on_device else 50, -(-q_len * groups // block_m)
    for mask in MASKS:
        call = make_call(
            q, DenseKV(k, k), mask=mask, blocks=selection, q_offset=at, kv_lens=lengths
        )
        found = block_lists.block_lists_of(
            dense_problem(call), tiles, block_m, block_n, groups=groups, by_keys=by_keys,
            keys=KeyRange(*keys),
        )  # fmt: skip
        for b, head in itertools.product(range(2), range(2)):
            blocks = allowed[b, head].repeat_interleave(q_block, 0)[:q_len]
            blocks = blocks.repeat_interleave(k_block, 1)[:, : keys[1]]
            seen = blocks & _visible(mask, offsets[b], q_len, keys[1])
            if lengths is not None:
                seen = seen & (torch.arange(keys[1]) < lengths[b].cpu())
            wanted = _tiles(seen.repeat_interleave(groups, 0), tiles, block_m, block_n, keys)
            wanted = tuple(x.mT if by_keys else x for x in wanted)
            listed = found.tiles[b, head], found.counts[b, head]
            _check_lists(*(x.cpu() for x in listed), *wanted, blocks.any())


def _visible(mask, offset, q_len, k_len):
    """Pairs that a mask lets through, from its definition."""
    at, k = (offset + torch.arange(q_len))[:, None], torch.arange(k_len)[None]
    seen = k <= at if mask.causal else torch.ones(q_len, k_len, dtype=torch.bool)
    return seen if mask.window is None else seen & ((k > at - mask.window) | (k < mask.sinks))


def _tiles(seen, tiles, block_m, block_n, keys):
    """Whether any, and whether every, pair of each tile is visible; no pair past the end is."""
    starts = range(keys[0], max(keys[1], keys[0] + 1), block_n)
    shape = tiles, len(starts)
    some, every = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for i, j in itertools.product(range(tiles), range(len(starts))):
        tile = seen[i * block_m : (i + 1) * block_m, starts[j] : starts[j] + block_n]
        some[i, j] = tile.any()
        every[i, j] = tile.numel() == block_m * block_n and tile.all()
    return some, every


def _check_lists(lists, counts, some, every, selected):
    for line, (full, count), any_of, all_of in zip(lists, counts, some, every, strict=True):
        assert sorted(line.tolist()) == list(range(len(line)))
        whole, listed = line[:full], line[:count]
        assert set(any_of.nonzero().flatten().tolist()) <= set(listed.tolist())
        assert set(whole.tolist()) == set(all_of.nonzero().flatten().tolist())
        assert selected or not count
