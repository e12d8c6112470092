"""Pages: thousands of random operations against plain lists, and the promises one by one."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saccade.cache.paged import PagedCache, PagePool
from saccade.cache.pages import Pages
from saccade.core import Mask, Unsupported
from saccade.core.kv import dense
from saccade.ops import attend, attention

SIZE = 3


class Machine(RuleBasedStateMachine):
    """A pool whose memory is a list of lists, beside sequences that are plain lists."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(11, SIZE)
        self.memory = [[None] * SIZE for _ in range(11)]
        self.rows = {}  # id -> expected tokens
        self.untold = set()

    def read(self, row):
        length, table = self.pages.length(row), self.pages.table(row)
        return [self.memory[table[i // SIZE]][i % SIZE] for i in range(length)]

    def write(self, row, tokens, told):
        start = self.pages.length(row)
        before = {r: self.read(r) for r in self.rows}
        needed, available = self.pages.needed([row], len(tokens)), self.pages.num_available
        try:
            copies = self.pages.extend(row, len(tokens), tokens if told else None)
        except Unsupported:
            assert needed > available
            assert {r: self.read(r) for r in self.rows} == before
            return
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        for i, token in enumerate(tokens, start):
            self.memory[self.pages.table(row)[i // SIZE]][i % SIZE] = token
        self.rows[row] += tokens

    tokens = st.lists(st.integers(0, 1), max_size=8)

    @rule(tokens=tokens)
    def create(self, tokens):
        row = self.pages.create(tokens)
        reused = self.pages.length(row)
        assert reused % SIZE == 0
        self.rows[row] = tokens[:reused]
        assert self.read(row) == tokens[:reused]  # found pages hold what they are said to hold
        self.write(row, tokens[reused:], told=True)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=tokens, told=st.sampled_from([True, True, True, False]))
    def extend(self, data, tokens, told):
        self.write(self.pick(data), tokens, told)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        row = self.pick(data)
        self.rows[self.pages.fork(row)] = list(self.rows[row])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), length=st.integers(0, 12))
    def truncate(self, data, length):
        row = self.pick(data)
        self.pages.truncate(row, length)
        del self.rows[row][length:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data):
        row = self.pick(data)
        self.pages.release(row)
        del self.rows[row]

    @precondition(lambda self: self.pages.num_pages < 14)
    @rule()
    def grow(self):
        self.pages.grow(self.pages.num_pages + 1)
        self.memory.append([None] * SIZE)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.rows)))

    @invariant()
    def nothing_leaks_and_everything_is_there(self):
        self.pages.check()
        assert {row: self.read(row) for row in self.rows} == self.rows

    def teardown(self):
        for row in self.rows:
            self.pages.release(row)
        self.pages.check()
        assert self.pages.num_available == self.pages.num_pages


TestPages = Machine.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


def test_a_prefix_is_found_again_after_its_sequence_ended():
    pages = Pages(8, 4)
    row = pages.create()
    pages.extend(row, 10, list(range(10)))
    kept = list(pages.table(row))
    pages.release(row)
    again = pages.create(list(range(9)))
    assert pages.length(again) == 8 and pages.table(again) == kept[:2]
    other = pages.create([0, 1, 2, 3, 9, 9, 9, 9])
    assert pages.table(other) == kept[:1]
    assert pages.length(pages.create([4, 5, 6, 7])) == 0  # the same page behind another prefix


def test_the_least_recently_used_goes_first_and_from_its_end():
    pages = Pages(4, 2)
    for tokens in ([1, 1, 2, 2], [3, 3, 4, 4]):
        row = pages.create(tokens)
        pages.extend(row, 4, tokens)
        pages.release(row)
    pages.extend(pages.create(), 2, [9, 9])
    assert pages.length(pages.create([1, 1, 2, 2])) == 2
    assert pages.length(pages.create([3, 3, 4, 4])) == 4


def test_a_full_pool_says_so():
    pages = Pages(2, 4)
    row = pages.create()
    with pytest.raises(Unsupported, match="2 pages of 4 tokens is full: 3 more pages are needed"):
        pages.extend(row, 9)
    with pytest.raises(ValueError, match="expected 2 tokens, got 1"):
        pages.extend(row, 2, [1])
    with pytest.raises(ValueError, match="page_size >= 1"):
        Pages(2, 0)


def kv(length, batch=1):
    return torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 16)


def test_many_sequences_of_different_lengths_in_one_pool():
    pool = PagePool(20, page_size=4)
    parts = {}
    for length in (5, 9, 1):
        row = pool.pages.create()
        parts[row] = kv(length)
        pool.write([row], *parts[row], tokens=list(range(length)))
    view = pool.view(list(parts))
    q = torch.randn(3, 4, 1, 16)
    ours = attend(q, view, mask=Mask(), kv_lens=view.kv_lens.long()).out
    for i, (k, v) in enumerate(parts.values()):
        expected = attention(q[i : i + 1], k, v, backend="reference")
        assert torch.allclose(ours[i : i + 1], expected, atol=1e-5)


def test_a_shared_prompt_is_stored_once():
    pool, (k, v) = PagePool(20, page_size=4), kv(10)
    first = pool.pages.create()
    pool.write([first], k, v, tokens=list(range(10)))
    second = pool.pages.create(list(range(10)))
    at = pool.pages.length(second)
    assert at == 8
    pool.write([second], k[:, :, at:], v[:, :, at:], tokens=[8, 9])
    assert torch.equal(dense(pool.view([second])).k, k)
    assert pool.pages.num_available == 20 - 4


def test_beams_share_what_they_have_in_common():
    cache, (k, v) = PagedCache(page_size=4), kv(9)
    cache.append(k, v)
    cache.reorder(torch.zeros(5, dtype=torch.int64))
    assert cache.pool.pages.num_pages == 3
    more = kv(2, batch=5)
    view = cache.append(*more)
    assert cache.pool.pages.num_pages - cache.pool.pages.num_available == 2 + 5
    assert torch.equal(dense(view).k, torch.cat((k.expand(5, -1, -1, -1), more[0]), 2))


def test_a_fixed_pool_refuses_and_keeps_what_it_has():
    cache, (k, v) = PagedCache(PagePool(2, page_size=4)), kv(8)
    cache.append(k, v)
    size = cache.nbytes
    with pytest.raises(Unsupported, match="is full"):
        cache.append(*kv(1))
    assert cache.seen == 8 and torch.equal(dense(cache.view()).k, k) and cache.nbytes == size


def test_drop_moves_and_rotates_the_rest():
    cache, (k, v) = PagedCache(page_size=4), kv(20)
    cache.append(k, v)
    cache.context_shift(5, 10, lambda keys, delta: keys + delta)
    held = dense(cache.view())
    assert cache.seen == 15
    assert torch.equal(held.k, torch.cat((k[:, :, :5], k[:, :, 10:] - 5), 2))
    assert torch.equal(held.v, torch.cat((v[:, :, :5], v[:, :, 10:]), 2))


def test_a_fork_goes_its_own_way():
    cache, (k, v) = PagedCache(page_size=4), kv(10)
    cache.append(k, v)
    branch = cache.fork()
    used = cache.pool.pages.num_pages - cache.pool.pages.num_available
    ours, theirs = kv(3), kv(3)
    cache.append(*ours)
    branch.append(*theirs)
    assert torch.equal(dense(cache.view()).k, torch.cat((k, ours[0]), 2))
    assert torch.equal(dense(branch.view()).k, torch.cat((k, theirs[0]), 2))
    assert used == 3
    assert cache.pool.pages.num_pages - cache.pool.pages.num_available == 2 + 2 * 2


def test_a_prompt_that_another_cache_read_is_found():
    pool, (k, v) = PagePool(page_size=4, grows=True), kv(11)
    first, second = PagedCache(pool), PagedCache(pool)
    assert first.expect(list(range(11))) == 0
    first.append(k[:, :, :6], v[:, :, :6])
    first.append(k[:, :, 6:], v[:, :, 6:])
    assert second.expect([*range(9), 77]) == 8 == second.seen
    assert torch.equal(dense(second.view()).k, k[:, :, :8])
    second.append(*kv(5))  # longer than announced: written, and nobody finds it
    first.reset()
    assert torch.equal(dense(second.view()).k[:, :, :8], k[:, :, :8])
    assert PagedCache(pool).expect(list(range(11))) == 8
    with pytest.raises(Unsupported, match="holds 13 tokens already"):
        second.expect([1])


def test_thousands_of_random_operations_leak_no_page():
    """Caches that share a pool, against plain tensors; at the end every page is free again."""
    torch.manual_seed(1)
    draw = random.Random(1)
    pool, caches, expected = PagePool(page_size=4, grows=True), [], []
    for _ in range(3000):
        what = draw.choice(["new", "append", "append", "fork", "truncate", "reorder", "end"])
        if not caches or what == "new":
            caches.append(PagedCache(pool))
            expected.append(torch.empty(draw.choice([1, 2]), 1, 0, 2))
        at = draw.randrange(len(caches))
        cache, held = caches[at], expected[at]
        if what == "append":
            k = torch.randn(held.shape[0], 1, draw.randrange(1, 9), 2)
            cache.append(k, -k)
            expected[at] = torch.cat((held, k), 2)
        elif what == "fork" and len(caches) < 9:
            caches.append(cache.fork())
            expected.append(held)
        elif what == "truncate":
            length = draw.randrange(held.shape[2] + 1)
            cache.truncate(length)
            expected[at] = held[:, :, :length]
        elif what == "reorder" and cache.seen:
            rows = torch.tensor([draw.randrange(held.shape[0]) for _ in range(draw.choice([1, 2]))])
            cache.reorder(rows)
            expected[at] = held[rows]
        elif what == "end" and (len(caches) > 6 or held.shape[2] > 40):
            cache.reset()
            del caches[at], expected[at]
        pool.pages.check()
    for cache, held in zip(caches, expected, strict=True):
        if cache.seen:
            tile = dense(cache.view())
            assert torch.equal(tile.k, held) and torch.equal(tile.v, -held)
        cache.reset()
    assert pool.pages.num_available == pool.pages.num_pages
