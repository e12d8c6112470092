"""Page allocator, pool and paged cache: random operations against plain lists, and single cases."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saccade.cache.page_allocator import PageAllocator
from saccade.cache.paged import PagedCache, PagePool
from saccade.core import Mask, Unsupported
from saccade.core.kv import dense
from saccade.ops import attend, attention, make_call
from tests.support.pages import assert_consistent

SIZE = 3


class Machine(RuleBasedStateMachine):
    """A pool whose memory is a list of lists, beside sequences that are plain lists."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(11, SIZE)
        self.memory = [[None] * SIZE for _ in range(11)]
        self.expected = {}  # id of a sequence -> tokens

    def read(self, seq):
        length, pages = self.allocator.length(seq), self.allocator.page_table(seq)
        return [self.memory[pages[i // SIZE]][i % SIZE] for i in range(length)]

    def write(self, seq, tokens, known):
        start = self.allocator.length(seq)
        before = {r: self.read(r) for r in self.expected}
        needed, available = (
            self.allocator.num_needed([seq], len(tokens)),
            self.allocator.num_available,
        )
        try:
            copies = self.allocator.extend(seq, len(tokens), tokens if known else None)
        except Unsupported:
            assert needed > available
            assert {r: self.read(r) for r in self.expected} == before
            return
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        for i, token in enumerate(tokens, start):
            self.memory[self.allocator.page_table(seq)[i // SIZE]][i % SIZE] = token
        self.expected[seq] += tokens

    tokens = st.lists(st.integers(0, 1), max_size=8)

    @rule(tokens=tokens)
    def create(self, tokens):
        seq = self.allocator.create(tokens)
        reused = self.allocator.length(seq)
        assert reused % SIZE == 0
        self.expected[seq] = tokens[:reused]
        assert self.read(seq) == tokens[:reused]  # cached pages hold the tokens of their keys
        self.write(seq, tokens[reused:], known=True)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), tokens=tokens, known=st.sampled_from([True, True, True, False]))
    def extend(self, data, tokens, known):
        self.write(self.pick(data), tokens, known)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data):
        seq = self.pick(data)
        self.expected[self.allocator.fork(seq)] = list(self.expected[seq])

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), length=st.integers(0, 12))
    def truncate(self, data, length):
        seq = self.pick(data)
        self.allocator.truncate(seq, length)
        del self.expected[seq][length:]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def release(self, data):
        seq = self.pick(data)
        self.allocator.release(seq)
        del self.expected[seq]

    @precondition(lambda self: self.allocator.num_pages < 14)
    @rule()
    def grow(self):
        self.allocator.grow(self.allocator.num_pages + 1)
        self.memory.append([None] * SIZE)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.expected)))

    @invariant()
    def no_page_leaks_and_every_token_is_stored(self):
        assert_consistent(self.allocator)
        assert {seq: self.read(seq) for seq in self.expected} == self.expected

    def teardown(self):
        for seq in self.expected:
            self.allocator.release(seq)
        assert_consistent(self.allocator)
        assert self.allocator.num_available == self.allocator.num_pages


TestPageAllocator = Machine.TestCase
TestPageAllocator.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


def test_a_released_prefix_stays_in_the_prefix_cache():
    allocator = PageAllocator(8, 4)
    seq = allocator.create()
    allocator.extend(seq, 10, list(range(10)))
    kept = list(allocator.page_table(seq))
    allocator.release(seq)
    again = allocator.create(list(range(9)))
    assert allocator.length(again) == 8 and allocator.page_table(again) == kept[:2]
    other = allocator.create([0, 1, 2, 3, 9, 9, 9, 9])
    assert allocator.page_table(other) == kept[:1]
    assert (
        allocator.length(allocator.create([4, 5, 6, 7])) == 0
    )  # the same tokens after another prefix


def test_the_least_recently_used_page_is_evicted_first_last_pages_before_first():
    allocator = PageAllocator(4, 2)
    for tokens in ([1, 1, 2, 2], [3, 3, 4, 4]):
        seq = allocator.create(tokens)
        allocator.extend(seq, 4, tokens)
        allocator.release(seq)
    allocator.extend(allocator.create(), 2, [9, 9])
    assert allocator.length(allocator.create([1, 1, 2, 2])) == 2
    assert allocator.length(allocator.create([3, 3, 4, 4])) == 4


def test_errors_of_a_full_pool():
    allocator = PageAllocator(2, 4)
    seq = allocator.create()
    with pytest.raises(Unsupported, match="2 pages of 4 tokens is full: 3 more pages are needed"):
        allocator.extend(seq, 9)
    with pytest.raises(ValueError, match="expected 2 tokens, got 1"):
        allocator.extend(seq, 2, [1])
    with pytest.raises(ValueError, match="page_size >= 1"):
        PageAllocator(2, 0)


def kv(length, batch=1):
    return torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 16)


def test_sequences_of_different_lengths_in_one_pool():
    pool = PagePool(20, page_size=4)
    parts = {}
    for length in (5, 9, 1):
        seq = pool.allocator.create()
        parts[seq] = kv(length)
        pool.write([seq], *parts[seq], tokens=list(range(length)))
    view = pool.view(list(parts))
    q = torch.randn(3, 4, 1, 16)
    ours = attend(make_call(q, view, mask=Mask(), kv_lens=view.kv_lens.long())).out
    for i, (k, v) in enumerate(parts.values()):
        expected = attention(q[i : i + 1], k, v, backend="reference")
        assert torch.allclose(ours[i : i + 1], expected, atol=1e-5)


def test_a_shared_prompt_is_stored_once():
    pool, (k, v) = PagePool(20, page_size=4), kv(10)
    first = pool.allocator.create()
    pool.write([first], k, v, tokens=list(range(10)))
    second = pool.allocator.create(list(range(10)))
    at = pool.allocator.length(second)
    assert at == 8
    pool.write([second], k[:, :, at:], v[:, :, at:], tokens=[8, 9])
    assert torch.equal(dense(pool.view([second])).k, k)
    assert pool.allocator.num_available == 20 - 4


def test_beams_share_pages():
    cache, (k, v) = PagedCache(page_size=4), kv(9)
    cache.append(k, v)
    cache.reorder(torch.zeros(5, dtype=torch.int64))
    assert cache.pool.allocator.num_pages == 3
    more = kv(2, batch=5)
    view = cache.append(*more)
    assert cache.pool.allocator.num_pages - cache.pool.allocator.num_available == 2 + 5
    assert torch.equal(dense(view).k, torch.cat((k.expand(5, -1, -1, -1), more[0]), 2))


def test_a_full_fixed_pool_refuses_and_changes_nothing():
    cache, (k, v) = PagedCache(PagePool(2, page_size=4)), kv(8)
    cache.append(k, v)
    size = cache.nbytes
    with pytest.raises(Unsupported, match="is full"):
        cache.append(*kv(1))
    assert cache.seen == 8 and torch.equal(dense(cache.view()).k, k) and cache.nbytes == size


def test_context_shift_moves_and_rotates_later_keys():
    cache, (k, v) = PagedCache(page_size=4), kv(20)
    cache.append(k, v)
    cache.context_shift(5, 10, lambda keys, delta: keys + delta)
    stored = dense(cache.view())
    assert cache.seen == 15
    assert torch.equal(stored.k, torch.cat((k[:, :, :5], k[:, :, 10:] - 5), 2))
    assert torch.equal(stored.v, torch.cat((v[:, :, :5], v[:, :, 10:]), 2))


def test_forks_copy_shared_pages_on_write():
    cache, (k, v) = PagedCache(page_size=4), kv(10)
    cache.append(k, v)
    branch = cache.fork()
    used = cache.pool.allocator.num_pages - cache.pool.allocator.num_available
    ours, theirs = kv(3), kv(3)
    cache.append(*ours)
    branch.append(*theirs)
    assert torch.equal(dense(cache.view()).k, torch.cat((k, ours[0]), 2))
    assert torch.equal(dense(branch.view()).k, torch.cat((k, theirs[0]), 2))
    assert used == 3
    assert cache.pool.allocator.num_pages - cache.pool.allocator.num_available == 2 + 2 * 2


def test_match_prefix_finds_a_prompt_of_another_cache():
    pool, (k, v) = PagePool(page_size=4, grows=True), kv(11)
    first, second = PagedCache(pool), PagedCache(pool)
    assert first.match_prefix(list(range(11))) == 0
    first.append(k[:, :, :6], v[:, :, :6])
    first.append(k[:, :, 6:], v[:, :, 6:])
    assert second.match_prefix([*range(9), 77]) == 8 == second.seen
    assert torch.equal(dense(second.view()).k, k[:, :, :8])
    second.append(*kv(5))  # longer than announced: does not enter the prefix cache
    first.reset()
    assert torch.equal(dense(second.view()).k[:, :, :8], k[:, :, :8])
    assert PagedCache(pool).match_prefix(list(range(11))) == 8
    with pytest.raises(Unsupported, match="holds 13 tokens already"):
        second.match_prefix([1])


def test_random_operations_leak_no_page():
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
        cache, stored = caches[at], expected[at]
        if what == "append":
            k = torch.randn(stored.shape[0], 1, draw.randrange(1, 9), 2)
            cache.append(k, -k)
            expected[at] = torch.cat((stored, k), 2)
        elif what == "fork" and len(caches) < 9:
            caches.append(cache.fork())
            expected.append(stored)
        elif what == "truncate":
            length = draw.randrange(stored.shape[2] + 1)
            cache.truncate(length)
            expected[at] = stored[:, :, :length]
        elif what == "reorder" and cache.seen:
            rows = torch.tensor(
                [draw.randrange(stored.shape[0]) for _ in range(draw.choice([1, 2]))]
            )
            cache.reorder(rows)
            expected[at] = stored[rows]
        elif what == "end" and (len(caches) > 6 or stored.shape[2] > 40):
            cache.reset()
            del caches[at], expected[at]
        assert_consistent(pool.allocator)
    for cache, stored in zip(caches, expected, strict=True):
        if cache.seen:
            tile = dense(cache.view())
            assert torch.equal(tile.k, stored) and torch.equal(tile.v, -stored)
        cache.reset()
    assert pool.allocator.num_available == pool.allocator.num_pages
