"""A ragged cache: each head keeps its own keys, and attention is over exactly those."""

import random

import pytest
import torch

from saccade.cache import RaggedCache, snapshot
from saccade.core import BadInput, DenseKV, Mask, RaggedKV, Unsupported
from saccade.ops import attend, attention, make_call
from tests.support.cases import HERE
from tests.support.pages import assert_consistent

BATCH, HEADS, DIM = 2, 2, 16
PROMPT, LENGTH = 60, 75


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    q = torch.randn(BATCH, 2 * HEADS, LENGTH, DIM)
    return q, torch.randn(BATCH, HEADS, LENGTH, DIM), torch.randn(BATCH, HEADS, LENGTH, DIM)


@pytest.fixture
def kept():
    """A different number of keys for every head: from one to nearly all."""
    torch.manual_seed(1)
    shares = torch.tensor([[0.02, 0.9], [0.3, 0.5]])
    kept = torch.rand(BATCH, HEADS, PROMPT) < shares[..., None]
    kept[..., -1] = True
    return kept


def compressed(qkv, kept, page_size=4):
    cache, (_, k, v) = RaggedCache(page_size=page_size), qkv
    cache.append(k[:, :, :PROMPT], v[:, :, :PROMPT])
    cache.keep(kept)
    return cache


def expected(qkv, alive, first, window=None):
    """Attention of the queries from `first` on, over the keys that are alive `[B, H, LENGTH]`."""
    q, k, v = qkv
    at = torch.arange(LENGTH)
    seen = at[None] <= at[first:, None]
    if window is not None:
        seen &= at[first:, None] - at[None] < window
    mask = (alive[:, :, None] & seen).repeat_interleave(2, 1)
    q = q[:, :, first:]
    call = make_call(q, DenseKV(k, v), mask=Mask(causal=False), attn_mask=mask)
    return attend(call, backend="reference").out


def alive_of(kept):
    return torch.cat((kept, torch.ones(BATCH, HEADS, LENGTH - PROMPT, dtype=torch.bool)), -1)


def read_on(cache, qkv, first, chunks, mask=None, backend="auto", **options):
    q, k, v = qkv
    outs, at = [], first
    for size in chunks:
        part = slice(at, at + size)
        view = cache.append(k[:, :, part], v[:, :, part])
        call = make_call(q[:, :, part], view, mask=mask or Mask(), **options)
        outs.append(attend(call, backend=backend).out)
        at += size
    return torch.cat(outs, 2)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_over_the_kept_keys(qkv, kept, backend, page_size, window):
    """Positions are kept, so a window means what it means over all keys."""
    cache = compressed(qkv, kept, page_size)
    ours = read_on(cache, qkv, PROMPT, [1, 1, 5, 8], Mask(window=window), backend=backend)
    assert torch.allclose(ours, expected(qkv, alive_of(kept), PROMPT, window), atol=1e-5)
    assert torch.equal(cache.kv_lens, (kept.sum(-1) + 15).int()) and cache.seen == LENGTH


def test_padding_masks_the_same_positions(qkv, kept):
    cache = compressed(qkv, kept)
    real = torch.arange(LENGTH)[None] >= torch.tensor([[7], [0]])
    ours = read_on(cache, qkv, PROMPT, [LENGTH - PROMPT], key_padding=real)
    alive = alive_of(kept) & real[:, None]
    assert torch.allclose(ours, expected(qkv, alive, PROMPT), atol=1e-5)


def test_memory_is_that_of_the_kept_keys(qkv, kept):
    cache = compressed(qkv, kept)
    pages = sum(-(-n // 4) for n in kept.sum(-1).flatten().tolist())
    most = -(-int(kept.sum(-1).max()) // 4)
    tables = BATCH * HEADS * (most + 1) * 4
    assert cache.nbytes == pages * 4 * (2 * DIM * 4 + 4) + tables
    prompt = 2 * BATCH * HEADS * 64 * DIM * 4
    assert cache.nbytes < 0.6 * prompt


def test_keeping_everything_equals_dense(qkv):
    cache = compressed(qkv, torch.ones(BATCH, HEADS, PROMPT, dtype=torch.bool))
    q, k, v = qkv
    ours = read_on(cache, qkv, PROMPT, [15])
    whole = attention(q, k, v, backend="reference")
    assert torch.allclose(ours, whole[:, :, PROMPT:], atol=1e-5)


def test_a_head_may_keep_nothing(qkv, kept):
    kept[0, 0] = False
    cache = compressed(qkv, kept)
    ours = read_on(cache, qkv, PROMPT, [15])
    assert torch.allclose(ours, expected(qkv, alive_of(kept), PROMPT), atol=1e-5)


def test_keeping_twice(qkv, kept):
    """The second selection is over the remaining keys, newest keys in the same columns."""
    cache = compressed(qkv, kept)
    read_on(cache, qkv, PROMPT, [10])
    gathered = cache.gather()
    assert (gathered.positions[..., -10:] == torch.arange(PROMPT, PROMPT + 10)).all()
    assert ((gathered.positions >= 0).sum(-1) == cache.kv_lens).all()
    cache.keep(gathered.positions % 2 == 0)
    alive = alive_of(kept)
    alive[..., 1 : PROMPT + 10 : 2] = False
    ours = read_on(cache, qkv, PROMPT + 10, [5])
    assert torch.allclose(ours, expected(qkv, alive, PROMPT + 10), atol=1e-5)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 0, 1], [1]])
def test_reorder_shares_pages_copied_on_write(qkv, kept, rows):
    cache = compressed(qkv, kept)
    size = cache.nbytes
    cache.reorder(torch.tensor(rows))
    assert abs(cache.nbytes - size) < 300  # only the tables
    picked = [x[rows] for x in qkv]
    ours = read_on(cache, picked, PROMPT, [3, 12])
    whole = expected(qkv, alive_of(kept), PROMPT)
    assert torch.allclose(ours, whole[rows], atol=1e-5)


def test_truncate_reaches_the_compression_and_no_further(qkv, kept):
    cache = compressed(qkv, kept)
    read_on(cache, qkv, PROMPT, [11])
    cache.truncate(PROMPT + 2)
    ours = read_on(cache, qkv, PROMPT + 2, [4, 9])
    assert torch.allclose(ours, expected(qkv, alive_of(kept), PROMPT)[:, :, 2:], atol=1e-5)
    cache.truncate(PROMPT)
    with pytest.raises(Unsupported, match="compressed when it had read 60 tokens"):
        cache.truncate(PROMPT - 1)


def test_context_shift_removes_positions_and_rotates_later_keys(qkv, kept):
    cache = compressed(qkv, kept)
    before = cache.gather()
    cache.context_shift(10, 30, lambda keys, delta: keys + delta)
    after = cache.gather()
    assert cache.seen == PROMPT - 20
    for b in range(BATCH):
        for h in range(HEADS):
            at, left = before.positions[b, h], after.positions[b, h]
            early, late = (at >= 0) & (at < 10), at >= 30
            assert torch.equal(left[left >= 0], torch.cat((at[early], at[late] - 20)))
            k = before.k[b, h]
            assert torch.equal(after.k[b, h][left >= 0], torch.cat((k[early], k[late] - 20)))
    view = cache.append(*(x[:, :, :3] for x in qkv[1:]))
    assert isinstance(view, RaggedKV) and view.shape[2] == PROMPT - 17


def test_a_restored_state_continues_as_the_original(qkv, kept):
    cache, copy = compressed(qkv, kept), RaggedCache(page_size=4)
    read_on(cache, qkv, PROMPT, [3])
    snapshot.restore(copy, snapshot.kind_of(cache), cache.state(), torch.device("cpu"))
    assert copy.nbytes == cache.nbytes and copy.seen == PROMPT + 3
    rest = [3, 9]
    assert torch.equal(read_on(copy, qkv, 63, rest), read_on(cache, qkv, 63, rest))
    assert copy.nbytes == cache.nbytes
    state = cache.state()
    broken = state._replace(tensors={**state.tensors, "positions": torch.zeros(1, 1, 1)})
    with pytest.raises(BadInput, match="its keys lack positions"):
        snapshot.restore(copy, "ragged", broken, torch.device("cpu"))
    assert copy.seen == 0


def test_reset_frees_the_pages(qkv, kept):
    cache = compressed(qkv, kept)
    cache.reset()
    assert cache.seen == 0 and cache.nbytes == 0
    q, k, v = qkv
    view = cache.append(k, v)
    assert torch.allclose(
        attend(make_call(q, view, mask=Mask())).out, attention(q, k, v), atol=1e-5
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_match_plain_lists(seed):
    """Against plain lists of (position, key) for every row and head; no page is lost on the way."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    cache, seen, compressed_at = RaggedCache(page_size=3), 0, 0
    rows = [[[], []] for _ in range(2)]
    for _ in range(300):
        what = draw.choice(["append"] * 3 + ["keep", "truncate", "drop", "reorder"])
        if what == "append" or not seen:
            k = torch.randn(len(rows), 2, draw.randrange(1, 8), 4)
            cache.append(k, -k)
            for heads, parts in zip(rows, k, strict=True):
                for stored, part in zip(heads, parts, strict=True):
                    stored += [(seen + i, key) for i, key in enumerate(part)]
            seen += k.shape[2]
        elif what == "keep":
            at = cache.gather().positions
            kept = torch.rand(at.shape) < draw.choice([0.3, 0.8])
            cache.keep(kept)
            for b, heads in enumerate(rows):
                for h, stored in enumerate(heads):
                    alive = set(at[b, h][kept[b, h]].tolist())
                    heads[h] = [item for item in stored if item[0] in alive]
            compressed_at = seen
        elif what == "truncate":
            length = draw.randrange(compressed_at, seen + 1)
            cache.truncate(length)
            rows = [[[item for item in stored if item[0] < length] for stored in hs] for hs in rows]
            seen = length
        elif what == "drop" and seen > 6:
            start = draw.randrange(seen - 4)
            stop = start + draw.randrange(1, 4)
            cache.context_shift(start, stop, lambda keys, delta: keys + delta)
            n = stop - start
            rows = [[[moved(i, start, stop) for i in stored if not start <= i[0] < stop]
                     for stored in heads] for heads in rows]  # fmt: skip
            seen, compressed_at = seen - n, max(min(compressed_at, start), compressed_at - n)
        elif what == "reorder":
            picked = [draw.randrange(len(rows)) for _ in range(draw.choice([1, 2, 3]))]
            cache.reorder(torch.tensor(picked))
            rows = [[list(stored) for stored in rows[i]] for i in picked]
        assert cache.seen == seen
        check(cache, rows)


def moved(item, start, stop):
    position, key = item
    return item if position < start else (position - (stop - start), key - (stop - start))


def check(cache, rows):
    if cache._pages is not None:
        assert_consistent(cache._pages._allocator)
    at = cache.gather()
    for b, heads in enumerate(rows):
        for h, stored in enumerate(heads):
            exists = at.positions[b, h] >= 0
            assert at.positions[b, h][exists].tolist() == [position for position, _ in stored]
            if stored:
                keys = torch.stack([key for _, key in stored])
                assert torch.allclose(at.k[b, h][exists], keys, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        RaggedCache(page_size=0)
