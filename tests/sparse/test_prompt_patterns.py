"""Patterns for prompts against the formulas of their papers, in float64, pair by pair."""

import numpy as np
import pytest
import torch

from saccade.core import DenseKV, Mask, RaggedKV, Span
from saccade.core.selection import BlockSelection
from saccade.ops import attend, make_call
from saccade.sparse import (
    PATTERNS,
    BigBird,
    BlockTopP,
    Dilated,
    FlashPrefill,
    Strided,
    TriangleMix,
    VerticalSlash,
    XAttention,
)
from saccade.sparse.pattern import of_layers, selected
from saccade.sparse.prompt import PromptPattern, followed_by

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
GROUP = HEADS // KV_HEADS


def draw(q_len, past, dtype=torch.float32, seed=0):
    """Queries and keys with a few keys that all queries like, so that weights are apart."""
    generator = torch.Generator().manual_seed(seed + 100 * q_len + past)
    q = torch.randn(BATCH, HEADS, q_len, DIM, generator=generator) + 0.7
    k = torch.randn(BATCH, KV_HEADS, past + q_len, DIM, generator=generator)
    loud = torch.rand(BATCH, KV_HEADS, past + q_len, generator=generator) < 0.05
    k[loud] += 1
    return q.to(dtype), DenseKV(k.to(dtype), k.to(dtype))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def always(pattern, q_len, past):
    """Blocks that are read anyway, and those that are seen: `[q_blocks, k_blocks]`."""
    size, blocks = pattern.block, -(-(past + q_len) // pattern.block)
    grids = np.zeros((2, -(-q_len // size), blocks), dtype=bool)
    for a, first in enumerate(range(past, past + q_len, size)):
        last = min(first + size, past + q_len) - 1
        for b in range(last // size + 1):
            grids[1, a, b] = True
            grids[0, a, b] = b < pattern.sink_blocks or b > first // size - pattern.window_blocks
    return grids


def by_antidiagonals(pattern, q, k, past):
    """XAttention, algorithm 1: one KV head's grid; `q [group, Lq, D]`, `k [Lk, D]`."""
    size, stride, q_len = pattern.block, pattern.stride, q.shape[1]
    kept, seen = always(pattern, q_len, past)
    weights = np.zeros(kept.shape)
    columns = len(k) // stride
    for head in q:
        for i in range(0, q_len, stride):
            scores = np.full(columns, -np.inf)
            last = past + min(i + stride, q_len) - 1
            for j in range(columns):
                if j * stride <= last:
                    pairs = [
                        head[i + stride - 1 - s] @ k[j * stride + s]
                        for s in range(stride)
                        if i + stride - 1 - s < q_len
                    ]
                    scores[j] = sum(pairs) / (DIM**0.5 * stride)
            for j, weight in enumerate(softmax(scores)):
                weights[i // size, j * stride // size] += weight
    grid = kept.copy()
    for a, row in enumerate(weights):
        for b in np.argsort(-row):
            if row[grid[a]].sum() < pattern.p * row.sum() and not kept[a, b]:
                grid[a, b] = True
    return grid & seen


def by_columns_and_diagonals(pattern, q, k, past):
    """MInference's vertical-slash in blocks: a block is read for a single pair in it."""
    size, end = pattern.block, past + q.shape[1]
    kept, seen = always(pattern, q.shape[1], past)
    columns, distances = np.zeros(end), np.zeros(end)
    for i in range(end - min(pattern.queries, -(-q.shape[1] // 64)), end):
        for head in q:
            weights = softmax(head[i - past] @ k[: i + 1].T * DIM**-0.5)
            columns[: i + 1] += weights
            distances[: i + 1] += weights[::-1]
    sums = [[x[n : n + size].sum() for n in range(0, end, size)] for x in (columns, distances)]
    others = [b for b in range(len(sums[0])) if seen[-1, b] and not kept[-1, b]]
    best = sorted(others, key=lambda b: -sums[0][b])[: pattern.columns]
    far = [t for t in range(len(sums[1])) if t > pattern.window_blocks - 2]
    bands = sorted(far, key=lambda t: -sums[1][t])[: pattern.diagonals]
    grid = kept.copy()
    for i in range(past, end):
        for j in range(i + 1):
            if j // size in best or (i - j) // size in bands:
                grid[(i - past) // size, j // size] = True
    return grid & seen


def by_thresholds(pattern, q, k, past):
    """FlashPrefill: each query by the means of blocks, each block by the largest of its row."""
    size, q_len = pattern.block, q.shape[1]
    kept, seen = always(pattern, q_len, past)
    means = [k[at : at + size].mean(0) for at in range(0, len(k), size)]
    grid = kept.copy()
    for head in q:
        for a in range(len(kept)):
            columns, weights = np.flatnonzero(seen[a]), np.zeros(seen[a].sum())
            for row in head[a * size : (a + 1) * size]:
                scores = np.array([row @ means[b] * DIM**-0.5 for b in columns])
                weights += np.exp(scores - scores.max())
            grid[a, columns] |= weights >= pattern.alpha * weights.max()
    return grid


def by_gaps(pattern, q, k, past):
    """Longformer's dilated window, in blocks."""
    kept, seen = always(pattern, q.shape[1], past)
    for a, first in enumerate(range(past, past + q.shape[1], pattern.block)):
        for step in range(1, pattern.reach + 1):
            b = first // pattern.block - step * pattern.dilation
            if b >= 0:
                kept[a, b] = True
    return kept & seen


FORMULAS = {
    XAttention: by_antidiagonals,
    VerticalSlash: by_columns_and_diagonals,
    FlashPrefill: by_thresholds,
    Dilated: by_gaps,
}
CASES = [
    XAttention(block=16, stride=4, p=0.5),
    XAttention(block=16, stride=16, p=0.8, sink_blocks=0, window_blocks=2),
    XAttention(block=24, stride=8, p=0.7),
    VerticalSlash(block=16, columns=2, diagonals=1, window_blocks=2),
    VerticalSlash(block=8, columns=1, diagonals=2, sink_blocks=0, window_blocks=1),
    VerticalSlash(block=8, columns=0, diagonals=0),
    FlashPrefill(block=16, alpha=0.6, sink_blocks=1, window_blocks=1, dense_rows=0),
    Dilated(block=8, dilation=3, reach=2),
]


def expected(pattern, q, k, past):
    q, k = q.double().numpy(), k.double().numpy()
    formula = FORMULAS[type(pattern)]
    grids = [
        [
            formula(pattern, q[b, h * GROUP : (h + 1) * GROUP], k[b, h], past)
            for h in range(KV_HEADS)
        ]
        for b in range(BATCH)
    ]
    return torch.from_numpy(np.array(grids))


@pytest.mark.parametrize(("q_len", "past"), [(32, 64), (130, 0), (37, 51), (25, 7)])
@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_a_selection_is_what_the_paper_says(pattern, q_len, past):
    q, view = draw(q_len, past)
    found = pattern.select(q, view, past).allowed.expand(BATCH, KV_HEADS, -1, -1)
    assert torch.equal(found, expected(pattern, q, view.k, past))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pattern", CASES, ids=str)
def test_a_gpu_selects_what_the_paper_says(pattern):
    q, view = draw(96, 64)
    there = DenseKV(view.k.cuda(), view.v.cuda())
    found = pattern.select(q.cuda(), there, 64).allowed.cpu().expand(BATCH, KV_HEADS, -1, -1)
    assert torch.equal(found, expected(pattern, q, view.k, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [CASES[0], CASES[3]], ids=str)
def test_half_precision(pattern, dtype):
    """Rounded scores may take one of two blocks that weigh the same, and no other ones."""
    q, view = draw(96, 64, dtype)
    found = pattern.select(q, view, 64).allowed
    assert (found != expected(pattern, q, view.k, 64)).float().mean() < 0.02


@pytest.mark.parametrize(
    "pattern", [TriangleMix(block=16, dense_rows=20, window_blocks=2)], ids=str
)
def test_triangle_mix_reads_all_for_the_last_rows_of_a_prompt_alone(pattern):
    q, view = draw(64, 48)
    kept, seen = map(torch.from_numpy, always(pattern, 64, 48))
    found = pattern.select(q, view, 48).allowed[0, 0]
    assert torch.equal(found[:2], kept[:2]) and torch.equal(found[2:], seen[2:])
    found = followed_by(4, pattern.select, q, view, 48).allowed[0, 0]
    assert torch.equal(found[:3], kept[:3]) and torch.equal(found[3:], seen[3:])
    assert torch.equal(followed_by(20, pattern.select, q, view, 48).allowed[0, 0], kept)


@pytest.mark.parametrize(
    "pattern",
    [CASES[0], CASES[2], CASES[-2], TriangleMix(block=24, dense_rows=30), BigBird(block=12)],
    ids=str,
)
def test_chunks_select_what_the_whole_prompt_does(pattern):
    """Vertical-slash is another matter: each chunk has last queries of its own."""
    length, size = 240, 48
    q, view = draw(length, 0)
    whole = pattern.select(q, view, 0).allowed.expand(BATCH, KV_HEADS, -1, -1)
    for start in range(0, length, size):
        stop = start + size
        part = DenseKV(view.k[:, :, :stop], view.v[:, :, :stop])
        chunk = q[:, :, start:stop]
        found = followed_by(length - stop, pattern.select, chunk, part, start).allowed
        rows, columns = size // pattern.block, stop // pattern.block
        wanted = whole[:, :, start // pattern.block :][:, :, :rows, :columns]
        assert torch.equal(found.expand_as(wanted), wanted)


def test_pieces_of_a_long_prompt_select_what_the_whole_does(monkeypatch):
    q, view = draw(200, 40)
    whole = [pattern.select(q, view, 40).allowed for pattern in CASES]
    monkeypatch.setattr("saccade.sparse.prompt.PIECE", 48)
    monkeypatch.setattr("saccade.sparse.vertical_slash.PIECE", 1)
    for pattern, wanted in zip(CASES, whole, strict=True):
        assert torch.equal(pattern.select(q, view, 40).allowed, wanted)


def test_random_blocks_are_as_many_as_asked_for_and_others_for_another_seed():
    q, view = draw(256, 64)
    grids = [BigBird(block=8, random_blocks=4, seed=seed).select(q, view, 64) for seed in (1, 1, 2)]
    first, again, other = (grid.allowed[0, 0] for grid in grids)
    kept, seen = map(torch.from_numpy, always(BigBird(block=8), 256, 64))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((first & ~kept).sum(1) == (seen & ~kept).sum(1).clamp_max(4)).all()
    assert not (first & ~seen).any()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "pattern", [*CASES, TriangleMix(block=16, dense_rows=20), BigBird(block=16)], ids=str
)
def test_a_padded_row_selects_what_it_selects_alone(pattern, left):
    """Padding of whole blocks, with NaN in it, moves the selection of a row and changes nothing."""
    length, room = 144, 3 * pattern.block
    q, view = draw(length, 0)
    alone = pattern.select(q, view, 0).allowed.expand(BATCH, KV_HEADS, -1, -1)[1:]
    pad = (0, 0, room, 0) if left else (0, 0, 0, room)
    wide, k = (torch.nn.functional.pad(x[1:], pad, value=torch.nan) for x in (q, view.k))
    others = torch.randn(2, HEADS, length + room, DIM)
    q = torch.cat((others[:1], wide.nan_to_num(0.5)))
    k = torch.cat((others[1:, :KV_HEADS], k))
    padding = torch.ones(2, length + room, dtype=torch.bool)
    padding[1, : room if left else None] &= not left
    if not left:
        padding[1, length:] = False
    found = pattern.select(q, DenseKV(k, k), 0, padding).allowed.expand(2, KV_HEADS, -1, -1)[1:]
    rows, columns = alone.shape[2:]
    first = 3 if left else 0
    own = found[:, :, first : first + rows, first : first + columns]
    assert torch.equal(own, alone)


def test_keys_are_read_by_position_whatever_stores_them():
    """A ring with a gap, and pages with another number of keys for each head."""
    pattern = XAttention(block=16, stride=4, p=0.5)
    q, view = draw(64, 32)
    gone = torch.zeros(96, dtype=torch.bool)
    gone[16:32] = True
    wanted = pattern.select(q, view, 32, ~gone.expand(BATCH, -1)).allowed
    order = torch.cat((torch.arange(16), torch.arange(64, 96), torch.arange(32, 64)))
    k = view.k[:, :, order]
    ring = DenseKV(k, k, (Span(0, 0, 16), Span(48, 32, 32), Span(16, 64, 32)))
    assert torch.equal(pattern.select(q, ring, 32).allowed, wanted)

    left = (~gone).nonzero()[:, 0]
    pages = view.k[:, :, left].reshape(BATCH * KV_HEADS * 10, 8, DIM)
    table = torch.arange(BATCH * KV_HEADS * 10, dtype=torch.int32).reshape(BATCH, KV_HEADS, 10)
    positions = left.int().repeat(BATCH * KV_HEADS, 1).reshape(-1, 8)
    lens = torch.full((BATCH, KV_HEADS), 80, dtype=torch.int32)
    ragged = RaggedKV(
        k=pages, v=pages, page_table=table, kv_lens=lens, positions=positions, end=96, max_length=80
    )
    assert torch.equal(pattern.select(q, ragged, 32).allowed, wanted)


@pytest.mark.parametrize(
    "name", [n for n, kind in PATTERNS.items() if issubclass(kind, PromptPattern)]
)
def test_few_queries_read_all_keys(name):
    pattern = PATTERNS[name]()
    q, view = draw(64, 400)
    for count in (1, 8, 63):
        part = q[:, :, -count:]
        assert selected(pattern, part, view, 464 - count) is None
        assert pattern.select(part, view, 464 - count).allowed.all()
    assert isinstance(selected(pattern, q, view, 400), BlockSelection)


def test_a_selection_of_everything_is_not_made():
    q, view = draw(128, 0)
    for pattern in (XAttention(p=1), BlockTopP(p=1), Strided(stride=1)):
        assert selected(pattern, q, view, 0) is None


def test_selected_blocks_are_what_is_attended_to():
    """Beside a softmax over the selected pairs alone, in float64."""
    q, view = draw(96, 32)
    blocks = XAttention(block=16, stride=4, p=0.4).select(q, view, 32)
    found = attend(make_call(q, view, mask=Mask(), blocks=blocks)).out
    seen = torch.arange(128) <= torch.arange(32, 128)[:, None]
    seen = seen & blocks.visible(torch.arange(96), torch.arange(128))
    assert seen.float().mean() < 0.5
    k, seen = (x.double().repeat_interleave(GROUP, 1) for x in (view.k, seen))
    weights = (q.double() @ k.mT * DIM**-0.5).masked_fill(seen == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.double(), weights @ k, atol=1e-5, rtol=1e-5)


def test_first_layers_are_dense():
    mix = TriangleMix(dense_layers=3)
    assert list(of_layers(mix, 5)) == [None, None, None, mix, mix]
    assert TriangleMix().first_layer(30) == 15 and TriangleMix(dense_layers=1.0).first_layer(4) == 4
    assert list(of_layers(XAttention(), 2)) == [XAttention()] * 2
    assert list(of_layers(None, 2)) == [None] * 2


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (XAttention, {"stride": 24}, ValueError, r"stride must divide block=64, got 24\."),
        (XAttention, {"stride": 0}, ValueError, "XAttention.stride must be at least 1 .*got 0"),
        (VerticalSlash, {"queries": 0}, ValueError, "queries must be at least 1 .*got 0"),
        (VerticalSlash, {"columns": -1}, ValueError, "columns must be at least 0 .*got -1"),
        (VerticalSlash, {"diagonals": 1.5}, TypeError, "diagonals must be an integer, got 1.5"),
        (FlashPrefill, {"alpha": 0}, ValueError, r"alpha is a share .*in \(0, 1\], got 0"),
        (Dilated, {"dilation": 0}, ValueError, "dilation must be at least 1 .*got 0"),
        (BigBird, {"random_blocks": -1}, ValueError, "random_blocks must be at least 0 .*got -1"),
        (TriangleMix, {"dense_rows": -1}, ValueError, "dense_rows must be at least 0 .*got -1"),
        (TriangleMix, {"dense_layers": -1}, ValueError, "dense_layers must be at least 0 .*got -1"),
        (TriangleMix, {"dense_layers": 1.5}, ValueError, r"in \[0, 1\], got 1.5\. Give an int"),
        (TriangleMix, {"dense_layers": float("nan")}, ValueError, r"in \[0, 1\], got nan"),
    ],
)
def test_errors(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**options)
