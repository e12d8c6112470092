"""The schedule of the Gluon prefill kernel on a CPU: balance of the CTAs, and which rows they load.

Everything that decides what is loaded and when is the kernel's own code (`gluon_emulator.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV
from saccade.ops import attend, attention
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.gluon.prefill.launch import launch_of, measured_launch
from saccade.ops.attention.nvidia.gluon.prefill.splits import num_splits
from saccade.ops.attention.nvidia.problem import dense_problem, paged_kv_lens, problem_of
from saccade.ops.gpu.kernel_args import BlockLists
from tests.ops import gluon_emulator
from tests.ops.gluon_emulator import Cta, Integer

MASKS = [{}, {"causal": False}, {"window": 200, "sinks": 3}, {"window": 40}, {"window": 1}]
KV_LENS = torch.tensor([600, 150, 333])
MAX_LEN, Q_LEN = 620, 150


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def launch(block_n=128, consumers=2):
    return replace(measured_launch(64, "varlen"), block_n=block_n, consumers=consumers)


def assert_equal(found, truth):
    assert torch.allclose(found.out, truth.out, atol=1e-9)
    lse = found.lse.nan_to_num(neginf=-9), truth.lse.double().nan_to_num(neginf=-9)
    assert torch.allclose(*lse, atol=1e-4)


@pytest.fixture
def batch():
    """(q, k, v) of rows with KV_LENS keys, NaN past them."""
    torch.manual_seed(0)
    q, k, v = random(3, 4, Q_LEN, 16), random(3, 2, MAX_LEN, 16), random(3, 2, MAX_LEN, 16)
    past = (torch.arange(MAX_LEN)[None] >= KV_LENS[:, None])[:, None, :, None]
    return q, k.masked_fill(past, torch.nan), v.masked_fill(past, torch.nan)


def truth_of(batch, mask):
    return attention(*batch, kv_lens=KV_LENS, **mask, return_lse=True, backend="reference")


@pytest.mark.parametrize(("block_n", "consumers"), [(128, 2), (64, 2), (128, 3)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_packed_sequences(mask, block_n, consumers):
    """Sequences without queries, without keys, with fewer keys than queries, of many tiles."""
    torch.manual_seed(0)
    q_lens, k_lens = [300, 0, 1, 77, 213, 20, 128, 30], [300, 3, 70, 77, 300, 0, 128, 5]
    cu = tuple(torch.tensor([0, *lens]).cumsum(0) for lens in (q_lens, k_lens))
    q, k, v = (random(1, heads, sum(lens), 16)
               for heads, lens in ((4, q_lens), (2, k_lens), (2, k_lens)))  # fmt: skip
    truth = attention(q, k, v, cu_seqlens=cu, **mask, return_lse=True, backend="reference")
    call = make_call(q, DenseKV(k, v), mask=Mask(**mask), cu_seqlens=cu)
    assert_equal(gluon_emulator.forward(dense_problem(call), launch(block_n, consumers)), truth)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_key_lengths_per_row(mask, batch):
    q, k, v = batch
    call = make_call(q, DenseKV(k, v), mask=Mask(**mask), kv_lens=KV_LENS)
    assert_equal(gluon_emulator.forward(dense_problem(call), launch()), truth_of(batch, mask))


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 128), (64, 64), (128, 64), (256, 128)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_pages(mask, page_size, block_n, batch):
    """Pages in any order; the table has invalid page numbers past the end of a row."""
    q, k, v = batch
    count = -(-MAX_LEN // page_size)
    order = torch.randperm(3 * count).view(3, count)
    pools = [paged(x, order, page_size) for x in (k, v)]
    used = torch.arange(count) * page_size < KV_LENS[:, None]
    view = PagedKV(*pools, torch.where(used, order, 10**6).int(), KV_LENS.int(), MAX_LEN)
    call = make_call(q, view, mask=Mask(**mask))
    problem = problem_of(call, view.k, view.v, paged_kv_lens(call))
    found = gluon_emulator.forward(problem, launch(block_n), view.page_table)
    assert_equal(found, truth_of(batch, mask))


@pytest.mark.parametrize(("pack", "splits"), [(4, 5), (1, 3), (2, 9)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_heads_share_tiles_and_keys_are_divided(mask, pack, splits):
    """Some splits have no tile of keys, and some rows see no key of a split."""
    torch.manual_seed(0)
    q, k, v = random(2, 8, 70, 16), random(2, 2, 900, 16), random(2, 2, 900, 16)
    truth = attention(q, k, v, **mask, return_lse=True, backend="reference")
    call = make_call(q, DenseKV(k, v), mask=Mask(**mask))
    shared = replace(launch(), pack=pack, splits=splits)
    assert_equal(gluon_emulator.forward(dense_problem(call), shared), truth)


@pytest.mark.parametrize(("q_block", "k_block"), [(128, 128), (64, 64), (32, 32), (128, 192)])
@pytest.mark.parametrize("causal", [True, False])
def test_selected_blocks(causal, q_block, k_block):
    """Rows of blocks with any number of keys' blocks, none too; tiles with gaps."""
    torch.manual_seed(0)
    q, k, v = random(2, 8, 300, 16), random(2, 2, 460, 16), random(2, 2, 460, 16)
    allowed = torch.rand(2, 2, -(-300 // q_block), -(-460 // k_block)) < 0.4
    blocks = BlockSelection(allowed=allowed, q_block=q_block, k_block=k_block)
    call = make_call(q, DenseKV(k, v), mask=Mask(causal=causal), blocks=blocks)
    cut = launch_of(dense_problem(call))
    cut = replace(measured_launch(64, "masked"), pack=cut.pack, parts=cut.parts)
    lists = lists_of(blocks, cut.block_m, cut.block_n // cut.parts, causal)
    found = gluon_emulator.forward(dense_problem(call), cut, lists=lists)
    assert_equal(found, attend(call, backend="reference"))


def lists_of(blocks, block_m, block_n, causal):
    """Lists of 300 queries over 460 keys: full tiles first, then those that need a mask."""
    grid = blocks.allowed.repeat_interleave(blocks.q_block // block_m, 2)
    grid = grid.repeat_interleave(blocks.k_block // block_n, 3)
    grid = grid[:, :, : -(-300 // block_m), : -(-460 // block_n)]
    rows, columns = grid.shape[2:]
    tiles, counts = torch.zeros(grid.shape), torch.zeros(*grid.shape[:3], 2)
    for b, head, row in itertools.product(range(2), range(2), range(rows)):
        first = 160 + row * block_m  # position of its first query
        end = first + 1 if causal else 460
        chosen = grid[b, head, row].nonzero().flatten().tolist()
        full = [n for n in chosen if (n + 1) * block_n <= min(end, 460)]
        partial = [n for n in chosen if n not in full and n * block_n < first + block_m]
        partial = partial if causal else [n for n in chosen if n not in full]
        tiles[b, head, row, : len(full + partial)] = torch.tensor(full + partial)
        counts[b, head, row] = torch.tensor([len(full), len(full + partial)])
    return BlockLists(tiles.int(), counts.int(), 2 * rows * columns, rows * columns, columns)


def test_splits_fill_the_gpu():
    """Times by hand: 8 tiles on 132 CTAs are one round up to 16 splits; 96 tiles are best in 4."""
    assert num_splits(8, 132, 8) == 8 and num_splits(8, 132, 32) == 15
    assert num_splits(96, 132, 32) == 4 and num_splits(128, 132, 32) == 1
    assert num_splits(8, 132, 1) == 1


def paged(x, order, page_size):
    """Rows `[B, H, length, D]` as a pool of pages in that order."""
    rows, count = order.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, count * page_size - x.shape[2]), value=torch.nan)
    pool = torch.empty(rows * count, x.shape[1], page_size, x.shape[3], dtype=x.dtype)
    pool[order.flatten()] = x.unflatten(2, (count, page_size)).transpose(1, 2).flatten(0, 1)
    return pool


@pytest.mark.parametrize(
    ("q_tiles", "heads_per_section"),
    [(32, 32), (64, 16), (128, 32), (128, 16), (128, 8), (128, 4), (256, 8)],
)
def test_serpentine_order_balances_causal_work(q_tiles, heads_per_section):
    """With every section from long to short, some CTAs would get a tenth more than others."""
    keys, heads = [0] * 132, 32
    for index in range(len(keys)):
        scheduler = Cta(index, len(keys)).tile_scheduler
        for i in range(scheduler.work_tile_count(heads * q_tiles)):
            _, tile = scheduler.work_tile(Integer(i), q_tiles, heads_per_section, heads * q_tiles)
            keys[index] += tile + 3  # tiles of keys, and what a work tile costs besides
    assert max(keys) < 1.005 * sum(keys) / len(keys)


def test_every_work_tile_is_computed_once():
    found = []
    for index in range(7):
        scheduler = Cta(index, 7).tile_scheduler
        for i in range(scheduler.work_tile_count(6 * 9)):
            found.append(tuple(map(int, scheduler.work_tile(Integer(i), 9, 2, 6 * 9))))
    assert sorted(found) == [(head, tile) for head in range(6) for tile in range(9)]
