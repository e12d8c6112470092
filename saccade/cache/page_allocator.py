"""Page tables of many sequences in plain integers: free list, reference counts, prefix cache.

A sequence is a list of pages of `page_size` tokens, its page table.  Pages are shared by reference
counting: a fork shares all of them, and a write into a shared page copies it first
(copy-on-write).  Full pages whose tokens are known enter the prefix cache under their own tokens
and the id of the page content before them, so equal keys mean equal prefixes, without hash
collisions.  Cached pages without a reference stay until room is needed; then the least recently
used one is evicted (PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from saccade.core import Unsupported

GROWTH_SHARE: Final = 16
_ROOT: Final = 0
"""Content id before the first page of every sequence."""

_PrefixKey = tuple[int, tuple[int, ...]]
"""(content id of the page before, tokens of the page)."""


def grown_pages(have: int, missing: int) -> int:
    """Pages of a pool of `have` that lacks `missing`: it grows by a sixteenth at least."""
    return have + max(missing, have // GROWTH_SHARE)


class PageCopy(NamedTuple):
    """A page whose contents have to be copied before the next write."""

    source: int
    target: int


@dataclass(slots=True)
class _Sequence:
    """Page table, length and, as far as they are known, tokens of a sequence."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    tokens: list[int] | None = field(default_factory=list)
    content_ids: list[int] = field(default_factory=list)  # of the full pages with known tokens


class PageAllocator:
    """A pool of pages and the page tables of the sequences in it.

    Args:
        num_pages: pages of the pool; `grow` adds more.
        page_size: tokens of a page.

    Raises:
        ValueError: num_pages below 0 or page_size below 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(
                f"a pool needs num_pages >= 0 and page_size >= 1, got {num_pages}, {page_size}."
            )
        self.page_size = page_size
        self._refcounts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced, LRU first
        self._prefix_cache: dict[_PrefixKey, int] = {}  # -> page
        self._cached: dict[int, tuple[_PrefixKey, int]] = {}  # page -> key, content id
        self._sequences: dict[int, _Sequence] = {}
        self._next_sequence = 0
        self._next_content = _ROOT + 1

    @property
    def num_pages(self) -> int:
        """Pages of the pool, used or not."""
        return len(self._refcounts)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones, and cached ones without a reference."""
        return len(self._free) + len(self._evictable)

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        return self._sequences[seq].length

    def page_table(self, seq: int) -> list[int]:
        """Pages of a sequence, in order."""
        return self._sequences[seq].pages

    def create(self, tokens: Sequence[int] = ()) -> int:
        """A new sequence that begins with the longest cached prefix of `tokens`, in full pages.

        Returns:
            Id of the sequence; its `length` is the number of tokens found in the prefix cache.
        """
        seq, before = _Sequence(), _ROOT
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            part = tuple(tokens[start : start + self.page_size])
            page = self._prefix_cache.get((before, part))
            if page is None:
                break
            self._acquire(page)
            before = self._cached[page][1]
            seq.pages.append(page)
            seq.content_ids.append(before)
        seq.length = len(seq.pages) * self.page_size
        seq.tokens = list(tokens[: seq.length])
        return self._add(seq)

    def fork(self, seq: int) -> int:
        """Id of a new sequence that shares all pages with `seq` until one of them is written."""
        old = self._sequences[seq]
        for page in old.pages:
            self._acquire(page)
        tokens = None if old.tokens is None else list(old.tokens)
        return self._add(_Sequence(list(old.pages), old.length, tokens, list(old.content_ids)))

    def num_needed(self, seqs: Sequence[int], count: int) -> int:
        """Pages that `count` more tokens for each of these sequences take from the pool."""
        if not count:
            return 0
        new, shared = 0, Counter[int]()
        for seq in map(self._sequences.__getitem__, seqs):
            new += -(-(seq.length + count) // self.page_size) - len(seq.pages)
            if seq.length % self.page_size:
                shared[seq.pages[-1]] += 1
        # Of n writers of a page the last writes in place, unless other sequences refer to it too.
        copies = (min(n, self._refcounts[page] - 1) for page, n in shared.items())
        return new + sum(copies)

    def check_room(self, seqs: Sequence[int], count: int) -> None:
        """Raise Unsupported unless each of these sequences can take `count` more tokens."""
        needed = self.num_needed(seqs, count)
        if needed > self.num_available:
            raise Unsupported(
                f"the pool of {self.num_pages} pages of {self.page_size} tokens is full: {needed} "
                f"more pages are needed, {self.num_available} are free. Release sequences, or "
                "make a larger pool."
            )

    def extend(self, seq: int, count: int, tokens: Sequence[int] | None = None) -> list[PageCopy]:
        """Allocate pages for `count` more tokens of a sequence, which are written next.

        Args:
            tokens: their ids, where known; full pages of known tokens enter the prefix cache.

        Returns:
            Pages to copy before writing, in order.

        Raises:
            ValueError: `tokens` are not `count` many.
            Unsupported: too few pages; nothing has changed then.
        """
        old = self._sequences[seq]
        if tokens is not None and len(tokens) != count:
            raise ValueError(f"expected {count} tokens, got {len(tokens)}.")
        self.check_room([seq], count)
        if not count:
            return []
        copies = self._make_last_page_writable(old)
        old.length += count
        while len(old.pages) * self.page_size < old.length:
            old.pages.append(self._allocate())
        if tokens is None or old.tokens is None:
            old.tokens = None
        else:
            old.tokens += tokens
            self._cache_full_pages(old)
        return copies

    def truncate(self, seq: int, length: int) -> None:
        """Remove all tokens of a sequence from `length` on, and release their pages."""
        old = self._sequences[seq]
        if length >= old.length:
            return
        kept = -(-length // self.page_size)
        self._release_pages(old.pages[kept:])
        del old.pages[kept:]
        if old.tokens is not None:
            del old.tokens[length:]
        elif length == 0:
            old.tokens = []
        del old.content_ids[length // self.page_size :]
        old.length = length

    def release(self, seq: int) -> None:
        """End a sequence; its cached pages stay in the prefix cache until they are evicted."""
        self._release_pages(self._sequences.pop(seq).pages)

    def grow(self, num_pages: int) -> None:
        """Add pages until there are `num_pages`."""
        first = len(self._refcounts)
        self._refcounts += [0] * (num_pages - first)
        self._free[:0] = range(num_pages - 1, first - 1, -1)

    def _add(self, seq: _Sequence) -> int:
        self._next_sequence += 1
        self._sequences[self._next_sequence] = seq
        return self._next_sequence

    def _acquire(self, page: int) -> None:
        """One more reference to a page."""
        self._evictable.pop(page, None)
        self._refcounts[page] += 1

    def _allocate(self) -> int:
        """A page that nothing refers to; evicts from the prefix cache where no page is free."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)  # the least recently used
            self._uncache(page)
        self._refcounts[page] = 1
        return page

    def _release_pages(self, pages: list[int]) -> None:
        """One reference less to each of these pages."""
        # Last pages first: a cached page is useless without those before it, so evict it earlier.
        for page in reversed(pages):
            self._refcounts[page] -= 1
            assert self._refcounts[page] >= 0, "a page was released twice"
            if self._refcounts[page]:
                continue
            if page in self._cached:
                self._evictable[page] = None
            else:
                self._free.append(page)

    def _make_last_page_writable(self, seq: _Sequence) -> list[PageCopy]:
        """Copy-on-write: the last page, where it has room, unshared and not in the cache."""
        if seq.length % self.page_size == 0:
            return []
        last = seq.pages[-1]
        if self._refcounts[last] == 1:
            self._uncache(last)
            return []
        seq.pages[-1] = self._allocate()
        self._refcounts[last] -= 1
        return [PageCopy(last, seq.pages[-1])]

    def _cache_full_pages(self, seq: _Sequence) -> None:
        """Enter the full pages of a sequence into the prefix cache, those not yet there."""
        assert seq.tokens is not None
        for index in range(len(seq.content_ids), seq.length // self.page_size):
            start = index * self.page_size
            before = seq.content_ids[-1] if seq.content_ids else _ROOT
            key = (before, tuple(seq.tokens[start : start + self.page_size]))
            known = self._prefix_cache.get(key)
            if known is None:
                self._prefix_cache[key] = seq.pages[index]
                self._cached[seq.pages[index]] = (key, self._next_content)
                seq.content_ids.append(self._next_content)
                self._next_content += 1
            else:  # another page has the same content
                seq.content_ids.append(self._cached[known][1])

    def _uncache(self, page: int) -> None:
        """Remove a page from the prefix cache."""
        if page in self._cached:
            key, _ = self._cached.pop(page)
            del self._prefix_cache[key]
