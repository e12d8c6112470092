"""What always holds between the page tables, reference counts and prefix cache of an allocator."""

from saccade.cache.page_allocator import PageAllocator


def assert_consistent(allocator: PageAllocator) -> None:
    counts = [0] * allocator.num_pages
    for seq in allocator._sequences.values():
        assert len(seq.pages) == -(-seq.length // allocator.page_size)
        assert len(set(seq.pages)) == len(seq.pages)
        for page in seq.pages:
            counts[page] += 1
    assert counts == allocator._refcounts
    idle = sorted([*allocator._free, *allocator._evictable])
    assert idle == [page for page, count in enumerate(counts) if count == 0]
    assert all(page in allocator._cached for page in allocator._evictable)
    assert not any(page in allocator._cached for page in allocator._free)
    keys = {key: page for page, (key, _) in allocator._cached.items()}
    assert keys == allocator._prefix_cache
