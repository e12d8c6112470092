"""Caches of a plan: what real caches would allocate, in a time that does not grow with the tokens.

Dense and ring caches run themselves on meta tensors, which have shapes and no memory; equal appends
that allocate nothing are run as one.  Others are counted, see `counted_cache`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.cache import (
    DenseCache,
    LateQuantizedCache,
    LayerCache,
    PagedCache,
    QuantizedCache,
    QuantizedRing,
    RaggedCache,
    RingCache,
)
from saccade.cache.recent_tokens import stored_dtype
from saccade.runtime.counted_cache import (
    CountedGroups,
    CountedPages,
    CountedRing,
    PlannedCache,
    Run,
    Summarized,
    between_checkpoints,
    check_checkpoints,
)
from saccade.runtime.model import ModelFacts


def planned_cache(cache: LayerCache, facts: ModelFacts) -> PlannedCache:
    """An empty cache made ready for a plan."""
    if isinstance(cache, PagedCache):
        k, v = new_keys(facts, 1, torch.device("meta"))
        cache.append(k, v)
        pool, pages = cache.pool, cache.pool.allocator
        page_bytes = pool.nbytes // pages.num_pages
        counted = CountedPages(1, pages.page_size, page_bytes, per_head=0)
        size = (cache.pool.dtype or facts.dtype).itemsize
        return Summarized(counted, cache.summaries, facts, size) if cache.summaries else counted
    if isinstance(cache, QuantizedRing):
        return CountedRing(cache, facts)
    if isinstance(cache, QuantizedCache):
        groups, size = CountedGroups(cache, facts), stored_dtype(facts.dtype).itemsize
        return Summarized(groups, cache.summaries, facts, size) if cache.summaries else groups
    return MetaCache(cache, facts)


class MetaCache:
    """A real cache on meta tensors."""

    def __init__(self, cache: LayerCache, facts: ModelFacts) -> None:
        self._cache, self._facts = cache, facts

    @property
    def nbytes(self) -> int:
        """See PlannedCache."""
        return self._cache.nbytes

    def run(self, size: int, count: int) -> None:
        """See PlannedCache; appends that allocate nothing are joined, which changes no count."""
        cache = self._cache
        if isinstance(cache, RingCache) and cache.most_checkpoints and size > 1:
            return self._run_with_checkpoints(cache, size, count)
        if isinstance(cache, RingCache) and not cache.most_checkpoints:
            return self._append(1)  # all that it will ever take
        while count:
            joined = max(1, min(count, _alike(cache, size, count)))
            self._append(joined * size)
            count -= joined

    def compress(self, kept: int, room: int) -> PlannedCache:
        """See PlannedCache."""
        cache = self._cache
        if isinstance(cache, DenseCache) and kept < cache.num_slots:
            return MetaCache(self._fewer(cache, kept, room), self._facts)
        if isinstance(cache, LateQuantizedCache):
            kept = min(kept, cache.num_slots)
            late = CountedGroups(cache.quantized(reserve=kept + room), self._facts)
            late.run(kept, 1)
            return late
        if isinstance(cache, RaggedCache) and kept < cache.seen:
            pages = self._pages(cache)
            pages.run(kept, 1)
            return pages
        return self

    def most_bytes(self, kept: int, room: int, every: int) -> int:
        """Bytes at most behind a `kv_policy`, whatever the text is and its heads keep.

        It grows by the same bytes for every key, whole blocks, groups and pages or not; so layers
        that divide their keys otherwise take as many.

        Args:
            kept: keys of a head that stay, on average; room: slots allocated beyond them.
            every: tokens that are stored before the next compression.
        """
        cache = self._cache
        if isinstance(cache, DenseCache):
            blocks = 0 if cache.summaries is None else cache.summaries.block - 1
            return self._fewer(cache, kept, room + blocks).nbytes
        if isinstance(cache, LateQuantizedCache):
            return CountedGroups(cache.quantized(), self._facts).most_bytes(kept + room)
        assert isinstance(cache, RaggedCache), "other caches are not compressed"
        return self._pages(cache).most_bytes(kept, every)

    def _fewer(self, cache: DenseCache, kept: int, room: int) -> DenseCache:
        """What `keep` leaves of a dense cache."""
        stored = cache.like[0]
        dtype = self._facts.dtype if stored is None else stored.dtype
        smaller = DenseCache(dtype=dtype, reserve=kept + room)
        smaller.summaries = cache.summaries and cache.summaries.empty()
        smaller.append(*new_keys(self._facts, kept, torch.device("meta")))
        return smaller

    def _pages(self, cache: RaggedCache) -> CountedPages:
        """The pages, still none, to which `keep` moves the keys of a ragged cache."""
        slots = cache.prompt.num_slots + cache.prompt.free_slots
        key_bytes = cache.nbytes // (self._facts.num_kv_heads * slots)
        page_bytes = cache.page_size * (key_bytes + 4)  # and an int32 position
        return CountedPages(self._facts.num_kv_heads, cache.page_size, page_bytes, per_head=4)

    def _append(self, tokens: int) -> None:
        self._cache.append(*new_keys(self._facts, tokens, torch.device("meta")))

    def _run_with_checkpoints(self, cache: RingCache, size: int, count: int) -> None:
        """One append after another, until checkpoints only replace others of their size."""
        check_checkpoints(cache.most_checkpoints)
        for joined in between_checkpoints(count):
            if cache.checkpoints_are_full:  # from here on memory stays as it is
                return
            self._append(size * joined)
            cache.checkpoint()


def _alike(cache: LayerCache, size: int, count: int) -> int:
    """How many of the next `count` appends leave the same cache if they are made as one."""
    if isinstance(
        cache, RaggedCache | LateQuantizedCache
    ):  # before it is compressed; afterwards it has pages
        return cache.prompt.free_slots // size
    if isinstance(cache, DenseCache):
        return cache.free_slots // size  # nothing is allocated for them
    return count  # a ring


def new_keys(facts: ModelFacts, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of so many tokens."""
    widths = facts.head_dim, facts.value_dim or facts.head_dim
    shapes = [(1, facts.num_kv_heads, count, width) for width in widths]
    k, v = (torch.empty(shape, dtype=facts.dtype, device=device) for shape in shapes)
    return k, v


def run_all(cache: PlannedCache, runs: Iterable[Run]) -> None:
    """Append all runs, in order."""
    for size, count in runs:
        if size and count:
            cache.run(size, count)
