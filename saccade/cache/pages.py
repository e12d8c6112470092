"""Which page belongs to whom: the bookkeeping of a pool, in plain integers and without tensors.

A sequence is a list of pages of `page_size` tokens.  Pages are shared by counting references: a
fork shares all of them, and whoever writes into a shared page gets a copy first (copy-on-write).
Full pages whose tokens are known are found again by what they hold: by their own tokens and by
the page before them, so that equal keys mean equal prefixes, without hash collisions.  Pages
that nobody uses stay findable until room is needed, and the least recently used go first
(PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from saccade.core import Unsupported

_ROOT: Final = 0
"""What the first page of every sequence follows."""

_Key = tuple[int, tuple[int, ...]]
"""(content that comes before, tokens of the page)."""


class Copy(NamedTuple):
    """A page that has to be copied before the next write."""

    source: int
    target: int


@dataclass(slots=True)
class _Row:
    """A sequence: its pages, its length, and its tokens as far as anybody told them."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    tokens: list[int] | None = field(default_factory=list)
    contents: list[int] = field(default_factory=list)  # of the full pages with known tokens


class Pages:
    """A pool of pages and the sequences in it.

    Args:
        num_pages: pages of the pool; `grow` adds more.
        page_size: tokens of a page.

    Raises:
        ValueError: no pages, or pages without room.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(
                f"a pool needs num_pages >= 0 and page_size >= 1, got {num_pages}, {page_size}."
            )
        self.page_size = page_size
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable, oldest first
        self._found: dict[_Key, int] = {}
        self._held: dict[int, tuple[_Key, int]] = {}  # page -> key, content
        self._rows: dict[int, _Row] = {}
        self._next_row = 0
        self._next_content = _ROOT + 1

    @property
    def num_pages(self) -> int:
        return len(self._refs)

    @property
    def num_available(self) -> int:
        """Pages that can be handed out, those that are still findable included."""
        return len(self._free) + len(self._unused)

    def length(self, row: int) -> int:
        """Tokens of a sequence."""
        return self._rows[row].length

    def table(self, row: int) -> list[int]:
        """Pages of a sequence, in order."""
        return self._rows[row].pages

    def create(self, tokens: Sequence[int] = ()) -> int:
        """A new sequence that begins with as many stored whole pages of `tokens` as there are.

        Its `length` says how many tokens need not be computed again.
        """
        row, before = _Row(), _ROOT
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            part = tuple(tokens[start : start + self.page_size])
            page = self._found.get((before, part))
            if page is None:
                break
            self._take(page)
            before = self._held[page][1]
            row.pages.append(page)
            row.contents.append(before)
        row.length = len(row.pages) * self.page_size
        row.tokens = list(tokens[: row.length])
        return self._add(row)

    def fork(self, row: int) -> int:
        """A new sequence that shares everything with `row` until one of them writes."""
        old = self._rows[row]
        for page in old.pages:
            self._take(page)
        tokens = None if old.tokens is None else list(old.tokens)
        return self._add(_Row(list(old.pages), old.length, tokens, list(old.contents)))

    def needed(self, rows: Sequence[int], count: int) -> int:
        """Pages that `count` more tokens for each of these sequences take from the pool."""
        if not count:
            return 0
        more, shared = 0, Counter[int]()
        for row in map(self._rows.__getitem__, rows):
            more += -(-(row.length + count) // self.page_size) - len(row.pages)
            if row.length % self.page_size:
                shared[row.pages[-1]] += 1
        # The last of those who share a page writes in place, unless somebody else needs it too.
        copies = (min(number, self._refs[page] - 1) for page, number in shared.items())
        return more + sum(copies)

    def check_room(self, rows: Sequence[int], count: int) -> None:
        """Raise Unsupported unless each of these sequences can take `count` more tokens."""
        needed = self.needed(rows, count)
        if needed > self.num_available:
            raise Unsupported(
                f"the pool of {self.num_pages} pages of {self.page_size} tokens is full: {needed} "
                f"more pages are needed, {self.num_available} are free. Release sequences, or "
                "make a larger pool."
            )

    def extend(self, row: int, count: int, tokens: Sequence[int] | None = None) -> list[Copy]:
        """Make room for `count` more tokens of a sequence, which are written next.

        Args:
            row: the sequence.
            count: tokens to add.
            tokens: what they are, where that is known; full pages can then be found again.

        Returns:
            Pages to copy before writing, in order.

        Raises:
            ValueError: as many tokens as count were expected.
            Unsupported: too few pages; nothing has changed then.
        """
        old = self._rows[row]
        if tokens is not None and len(tokens) != count:
            raise ValueError(f"expected {count} tokens, got {len(tokens)}.")
        self.check_room([row], count)
        if not count:
            return []
        copies = self._make_writable(old)
        old.length += count
        while len(old.pages) * self.page_size < old.length:
            old.pages.append(self._allocate())
        if tokens is None or old.tokens is None:
            old.tokens = None
        else:
            old.tokens += tokens
            self._make_findable(old)
        return copies

    def truncate(self, row: int, length: int) -> None:
        """Forget all tokens of a sequence from `length` on, and give back their pages."""
        old = self._rows[row]
        if length >= old.length:
            return
        keep = -(-length // self.page_size)
        self._give_back(old.pages[keep:])
        del old.pages[keep:]
        full = length // self.page_size
        if old.tokens is not None:
            del old.tokens[length:]
        elif length == 0:
            old.tokens = []
        del old.contents[full:]
        old.length = length

    def release(self, row: int) -> None:
        """End a sequence; its findable pages stay findable until their room is needed."""
        self._give_back(self._rows.pop(row).pages)

    def grow(self, num_pages: int) -> None:
        """Add pages until there are `num_pages`."""
        first = len(self._refs)
        self._refs += [0] * (num_pages - first)
        self._free[:0] = range(num_pages - 1, first - 1, -1)

    def check(self) -> None:
        """Assert that every page is in one place and counted right; for tests."""
        counts = [0] * self.num_pages
        for row in self._rows.values():
            assert len(row.pages) == -(-row.length // self.page_size)
            assert len(set(row.pages)) == len(row.pages)
            for page in row.pages:
                counts[page] += 1
        assert counts == self._refs
        idle = sorted([*self._free, *self._unused])
        assert idle == [page for page, count in enumerate(counts) if count == 0]
        assert all(page in self._held for page in self._unused)
        assert not any(page in self._held for page in self._free)
        assert {key: page for page, (key, _) in self._held.items()} == self._found

    def _add(self, row: _Row) -> int:
        self._next_row += 1
        self._rows[self._next_row] = row
        return self._next_row

    def _take(self, page: int) -> None:
        self._unused.pop(page, None)
        self._refs[page] += 1

    def _allocate(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)  # the least recently used
            self._forget(page)
        self._refs[page] = 1
        return page

    def _give_back(self, pages: list[int]) -> None:
        # Last pages first: they are worth nothing without the ones before, so they go first.
        for page in reversed(pages):
            self._refs[page] -= 1
            assert self._refs[page] >= 0, "a page was given back twice"
            if self._refs[page]:
                continue
            if page in self._held:
                self._unused[page] = None
            else:
                self._free.append(page)

    def _make_writable(self, row: _Row) -> list[Copy]:
        """The last page, where it has room, for this sequence alone and no longer findable."""
        if row.length % self.page_size == 0:
            return []
        last = row.pages[-1]
        if self._refs[last] == 1:
            self._forget(last)
            return []
        row.pages[-1] = self._allocate()
        self._refs[last] -= 1
        return [Copy(last, row.pages[-1])]

    def _make_findable(self, row: _Row) -> None:
        """Note what the full pages hold that are not noted yet."""
        assert row.tokens is not None
        for index in range(len(row.contents), row.length // self.page_size):
            start = index * self.page_size
            before = row.contents[-1] if row.contents else _ROOT
            key = (before, tuple(row.tokens[start : start + self.page_size]))
            known = self._found.get(key)
            if known is None:
                self._found[key] = row.pages[index]
                self._held[row.pages[index]] = (key, self._next_content)
                row.contents.append(self._next_content)
                self._next_content += 1
            else:  # another page holds the same
                row.contents.append(self._held[known][1])

    def _forget(self, page: int) -> None:
        if page in self._held:
            key, _ = self._held.pop(page)
            del self._found[key]
