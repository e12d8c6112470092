"""Summaries that caches keep equal those of the keys they hold, whatever was done to the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.cache import (
    DenseCache,
    KeySummaries,
    PagedCache,
    QuantizedCache,
    make_layer_cache,
    snapshot,
)
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform

CACHES = {
    "dense": DenseCache,
    "paged": lambda: PagedCache(page_size=4),
    "quantized": lambda: QuantizedCache(group=8, recent=2),
    "quantized as given": lambda: QuantizedCache(group=8, recent=2, hadamard=False),
}
BLOCK, DIM = 8, 16
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("truncate"), st.integers(0, 60)),
        st.tuples(st.just("shift"), st.integers(0, 30)),
        st.tuples(st.just("reorder"), st.integers(0, 1)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("restore"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


def made(name, kind):
    cache = CACHES[name]()
    cache.summaries = KeySummaries(kind, BLOCK)
    return cache


def keys(count):
    return torch.randn(2, 2, count, DIM), torch.randn(2, 2, count, DIM)


def stored_keys(cache, view):
    """Keys as they were given, from the view alone."""
    k = dense(view).k.float()
    return hadamard_transform(k) if view.hadamard else k


def rows_by_loop(k, kind, count):
    """Summaries of the first blocks, one after the other."""
    rows = []
    for block in range(count):
        part = k[:, :, block * BLOCK : (block + 1) * BLOCK].double()
        low, high = part.min(2).values, part.max(2).values
        rows.append(part.sum(2) / BLOCK if kind == "mean" else torch.cat((high, low), -1))
    return torch.stack(rows, dim=2) if rows else k.new_zeros(2, 2, 0, 0)


def act(cache, name, kind, action, number):
    """The cache after one action."""
    if action == "truncate":
        cache.truncate(min(number, cache.seen))
    elif action == "shift" and cache.seen > 2:
        start = min(number, cache.seen - 2)
        cache.context_shift(start, start + 1, lambda k, by: k + 0.01 * by)
    elif action == "reorder" and cache.seen:
        cache.reorder(torch.tensor([1, number]))
    elif action == "reset":
        cache.reset()
    elif action == "restore":
        other = made(name, kind)
        snapshot.restore(other, snapshot.kind_of(cache), cache.state(), torch.device("cpu"))
        return other
    return cache


@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=20, deadline=None)
@given(actions=ACTIONS, last=st.integers(1, 30))
def test_they_are_those_of_the_stored_keys(name, kind, actions, last):
    torch.manual_seed(0)
    cache = made(name, kind)
    for action, number in actions:
        if action == "append":
            cache.append(*keys(number))
        else:
            cache = act(cache, name, kind, action, number)
    view = cache.append(*keys(last))
    rows = cache.summarize()
    settled = cache.lasting()[0] // BLOCK
    assert rows.shape[2] == settled
    if settled:
        expected = rows_by_loop(stored_keys(cache, view), kind, settled)
        assert torch.allclose(rows.double(), expected, atol=2e-2 if "quantized" in name else 1e-5)


def test_each_key_is_read_once(monkeypatch):
    cache, read = made("dense", "mean"), []
    original = cache.keys
    monkeypatch.setattr(cache, "keys", lambda a, b: read.append((a, b)) or original(a, b))
    for count in (3, 9, 1, 30, 1, 1):
        cache.append(*keys(count))
    spans = [range(a, b) for a, b in read if b > a]
    assert [i for span in spans for i in span] == list(range(40))


def test_keys_written_to_their_places_are_summarized_before_the_next_step():
    cache = made("dense", "bounds")
    cache.append(*keys(15))
    for _ in range(3):
        place = cache.place(1, torch.float32)
        place.parts[0][:, :, place.slot] = torch.randn(2, 2, DIM)
        cache.commit(1)
    cache.place(1, torch.float32)
    expected = rows_by_loop(cache.view().k, "bounds", 2)
    assert torch.equal(cache.summaries.filled().double(), expected)


def test_their_bytes_are_counted():
    plain, cache = DenseCache(), made("dense", "mean")
    for each in (plain, cache):
        each.append(*keys(64))
    assert cache.nbytes - plain.nbytes == 2 * 2 * (64 // BLOCK) * DIM * 4


def test_only_caches_of_all_keys_of_a_pattern_keep_them():
    assert make_layer_cache(summary=("mean", 8)).summaries.block == 8
    assert make_layer_cache(page_size=4, summary=("bounds", 8)).summaries.kind == "bounds"
    assert make_layer_cache(type_k="int8", type_v="int8", summary=("mean", 8)).summaries is not None
    assert make_layer_cache().summaries is None
    ring = make_layer_cache(window=300, type_k="int8", type_v="int8", summary=("mean", 8))
    assert ring.summaries is None
