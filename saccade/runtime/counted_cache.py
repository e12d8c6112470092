"""Caches of a plan that are counted instead of stored, by the rules that caches themselves grow by.

Pages and the groups of a quantized cache.  (On a GPU, captured steps hold a little more: a
quantized cache then has room for STEPPING_ROOM more tokens, so that it seldom moves.)
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from saccade.cache import KeySummaries, QuantizedCache, QuantizedRing
from saccade.cache.checkpoints import Checkpoints
from saccade.cache.page_allocator import GROWTH_SHARE, grown_pages
from saccade.cache.quantized_groups import grown_groups
from saccade.cache.recent_tokens import room_for, stored_dtype
from saccade.cache.summaries import summary_bytes
from saccade.core import BadInput
from saccade.core.check import LARGEST_POSITION
from saccade.runtime.model import ModelFacts

Run = tuple[int, int]
"""(tokens of an append, how many such appends follow one another)."""

MOST_CHECKPOINTS = 256
MOST_STEPS = 512
"""Appends between which a ring makes checkpoints; so many more are spread evenly over the rest."""


class PlannedCache(Protocol):
    """The cache of a layer in a plan."""

    @property
    def nbytes(self) -> int:
        """Bytes it would have allocated."""
        ...

    def run(self, size: int, count: int) -> None:
        """Append `size` tokens `count` times."""
        ...

    def compress(self, kept: int, room: int) -> PlannedCache:
        """The cache after a `kv_policy`; all heads are assumed to keep equally many keys.

        Args:
            kept: keys of a head that stay; room: slots allocated beyond them.
        """
        ...


def check_checkpoints(most: int) -> None:
    """Raise BadInput where there are too many checkpoints to count."""
    if most > MOST_CHECKPOINTS:
        raise BadInput(
            f"a plan counts up to {MOST_CHECKPOINTS} checkpoints, got ctx_checkpoints={most}. "
            "Lower it."
        )


def between_checkpoints(count: int) -> list[int]:
    """How many appends follow one another before each checkpoint, of so many appends."""
    exact, rest = min(count, MOST_STEPS), max(0, count - MOST_STEPS)
    spread = min(rest, MOST_STEPS)
    later = [rest * (i + 1) // spread - rest * i // spread for i in range(spread)]
    return [1] * exact + later


class Summarized:
    """A counted cache that keeps summaries of its keys.

    Args:
        cache: the same without them.
        kept: the summaries; size: bytes of a number of the keys.
    """

    def __init__(
        self, cache: CountedPages | CountedGroups, kept: KeySummaries, facts: ModelFacts, size: int
    ) -> None:
        self._cache, self._heads = cache, facts.num_kv_heads
        self._bytes_for = partial(
            summary_bytes, kept.kind, kept.block, width=facts.head_dim, itemsize=size
        )

    @property
    def nbytes(self) -> int:
        """See PlannedCache."""
        return self._cache.nbytes + self._heads * self._bytes_for(tokens=self._cache.capacity)

    def run(self, size: int, count: int) -> None:
        """See PlannedCache."""
        self._cache.run(size, count)

    def compress(self, kept: int, room: int) -> PlannedCache:
        """Nothing: such a cache takes no policy."""
        return self


class CountedPages:
    """Pages of equally long sequences, one a head (or one for all heads), counted.

    Args:
        sequences: how many; page_size: tokens of a page; page_bytes: bytes of a page.
        per_head: bytes beside pages and page table, of each sequence.
    """

    def __init__(self, sequences: int, page_size: int, page_bytes: int, *, per_head: int) -> None:
        self._sequences, self._page_size, self._page_bytes = sequences, page_size, page_bytes
        self._per_head = per_head
        self._pages = self._length = 0

    @property
    def capacity(self) -> int:
        """Tokens that the pages of a sequence hold."""
        return -(-self._length // self._page_size) * self._page_size

    @property
    def nbytes(self) -> int:
        """See PlannedCache; an entry of the page table is an int32."""
        table = 4 * -(-self._length // self._page_size)
        return self._pages * self._page_bytes + self._sequences * (table + self._per_head)

    def run(self, size: int, count: int) -> None:
        """See PlannedCache."""
        while count:
            free = self._pages // self._sequences * self._page_size - self._length
            joined = max(1, min(count, free // size))
            self._length += joined * size
            needed = self._sequences * -(-self._length // self._page_size)
            if needed > self._pages:
                self._pages = grown_pages(self._pages, needed - self._pages)
            count -= joined

    def compress(self, kept: int, room: int) -> PlannedCache:
        """Nothing: a cache of pages takes no policy."""
        return self

    def most_bytes(self, length: int, more: int) -> int:
        """Bytes at most of so many tokens a sequence on average, and while `more` of each follow.

        Each last page may hold one token, and one sequence all others, as wide as page tables are
        then.  Pages grow by a share.
        """
        slots = self._sequences * (length + more + self._page_size - 1)
        slots += slots // GROWTH_SHARE if more else 0
        pages = -(-slots * (self._page_bytes + 4 * self._sequences) // self._page_size)
        return pages + self._sequences * self._per_head


class CountedGroups:
    """A quantized cache of which only the numbers of tokens are kept."""

    def __init__(self, cache: QuantizedCache, facts: ModelFacts) -> None:
        fmt = cache.fmt
        self._fmt, self._least, self._most = fmt, cache.least_recent, cache.recent.most
        self._room = fmt.whole(cache.reserved - self._least)
        self._casts = stored_dtype(facts.dtype) != facts.dtype
        self._first = self._quantized = self._recent = self._capacity = self._slots = 0
        widths = facts.head_dim, facts.value_dim or facts.head_dim
        scales = fmt.group * widths[1] // fmt.value_group(widths[1]) + widths[0]
        qdata = fmt.group * (widths[0] * fmt.bits_k + widths[1] * fmt.bits_v) // 8
        self._group_bytes = facts.num_kv_heads * (qdata + 4 * scales)
        size = facts.num_kv_heads * stored_dtype(facts.dtype).itemsize
        self._key_bytes, self._slot_bytes = size * widths[0], size * sum(widths)

    @property
    def capacity(self) -> int:
        """Tokens that groups are allocated for."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """See PlannedCache."""
        groups = self._capacity // self._fmt.group
        return groups * self._group_bytes + self._slots * self._slot_bytes

    def run(self, size: int, count: int) -> None:
        """See PlannedCache; appends that allocate nothing are counted by whole groups."""
        period = self._fmt.group // gcd(self._fmt.group, size)
        while count:
            before = self._recent, self._slots, self._quantized
            for _ in range(min(count, period)):
                self._append(size)
            count = max(0, count - period)
            again, quantized = before[:2] == (self._recent, self._slots), before[2]
            skipped = min(count // period, self._repeats(period * size, quantized) if again else 0)
            self._skip(skipped * period * size, grows=quantized < self._quantized)
            count -= skipped * period

    def compress(self, kept: int, room: int) -> PlannedCache:
        """Nothing: a quantized cache takes no policy."""
        return self

    def most_bytes(self, tokens: int) -> int:
        """Bytes at most of so many tokens or fewer, the groups allocated for at once."""
        groups = max(0, tokens - self._least) * self._group_bytes
        return -(-groups // self._fmt.group) + self._most * self._slot_bytes

    @property
    def _seen(self) -> int:
        return self._first + self._quantized + self._recent

    def _repeats(self, tokens: int, before: int) -> int:
        """How often so many tokens more, after which as many wait, allocate nothing."""
        return (self._capacity - self._quantized) // tokens

    def _skip(self, tokens: int, *, grows: bool) -> None:
        """Count tokens that leave as many waiting: quantized, or in place of older ones."""
        self._quantized += tokens * grows
        self._first += tokens * (not grows)

    def _append(self, size: int) -> None:
        if self._recent - self._least >= self._fmt.group:
            self._quantize(self._recent - self._least)
            self._slots = room_for(self._recent, self._most)
        self._recent += size
        if self._recent > self._most or (size > 1 and self._casts):
            self._quantize(self._recent - self._least)
            self._slots = room_for(self._recent, self._most)
        elif self._recent > self._slots:
            self._slots = room_for(self._recent, self._most)

    def _quantize(self, ready: int) -> None:
        moved = self._fmt.whole(ready)
        self._recent -= moved
        self._store(moved)

    def _store(self, groups: int) -> None:
        self._quantized += groups
        if self._quantized > self._capacity:
            have, group = self._capacity, self._fmt.group
            self._capacity = grown_groups(have, self._quantized, group, self._room)


class CountedRing(CountedGroups):
    """The same of a quantized ring, which removes groups and makes checkpoints."""

    def __init__(self, cache: QuantizedRing, facts: ModelFacts) -> None:
        super().__init__(cache, facts)
        self._window, self._sinks = cache.window, cache.sinks
        self._checkpoints = Checkpoints[tuple[Tensor]](cache.most_checkpoints)

    @property
    def nbytes(self) -> int:
        """See PlannedCache; the keys of sinks are there twice, as given and where they stand."""
        sinks = self._sinks * (self._slot_bytes + self._key_bytes) if self._seen else 0
        return super().nbytes + sinks + self._checkpoints.nbytes

    def run(self, size: int, count: int) -> None:
        """See PlannedCache."""
        if size == 1 or not self._checkpoints.most:
            return super().run(size, count)
        check_checkpoints(self._checkpoints.most)
        for joined in between_checkpoints(count):
            super().run(size, joined)
            self._checkpoint()
        return None

    def _checkpoint(self) -> None:
        skipped = min(self._unseen, self._quantized)
        groups = (self._quantized - skipped) // self._fmt.group * self._group_bytes
        nbytes = groups + self._recent * self._slot_bytes
        if self._checkpoints.wants(self._seen):
            copy = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self._checkpoints.add(self._seen, (copy,))

    def _repeats(self, tokens: int, before: int) -> int:
        if before == self._quantized:  # the window is full
            return LARGEST_POSITION
        free = (self._window - self._seen) // tokens
        return max(0, min(super()._repeats(tokens, before), free))

    def _append(self, size: int) -> None:
        taken = max(0, min(self._sinks - self._first, size))
        self._first += taken
        super()._append(size - taken)

    def _quantize(self, ready: int) -> None:
        moved = self._fmt.whole(ready)
        unseen = self._unseen
        old = min(unseen, self._quantized)
        new = min(unseen - old, moved)
        self._recent -= moved
        self._quantized -= old
        self._first += old + new
        self._store(moved - new)

    @property
    def _unseen(self) -> int:
        """Tokens of whole groups, from the first on, that the next query does not see."""
        return self._fmt.whole(self._seen - self._window + 1 - self._first)
