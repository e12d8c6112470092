"""A captured step reads and writes fixed addresses: each of them has to be in its cache's key."""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from saccade.cache import Cursor, DenseCache, QuantizedCache, QuantizedRing, RingCache

CACHES = {
    "dense": DenseCache,
    "ring": lambda: RingCache(window=12, sinks=2, chunk=4),
    "int8": lambda: QuantizedCache(group=4, recent=4, hadamard=False),
    "int8 ring": lambda: QuantizedRing(window=8, group=4, recent=4, hadamard=False),
}


def read_by(view):
    """All tensors of a view."""
    if isinstance(view, Tensor):
        return [view]
    parts = [getattr(view, f.name) for f in fields(view)] if is_dataclass(view) else view
    return [x for part in parts for x in read_by(part)] if isinstance(parts, (list, tuple)) else []


def tokens(count):
    return torch.randn(1, 2, count, 8)


def step(cache):
    """One token as DecodeStep reads it: (addresses that its view has, the cache's key)."""
    cache.reserve(1)
    key, start = cache.graph_key(), torch.tensor([cache.seen])
    view = cache.write(tokens(1), tokens(1), Cursor(start, start + 1), None).view
    cache.commit(1)
    return {x.data_ptr() for x in read_by(view)}, key


CHANGES = {
    "steps": lambda cache: [step(cache) for _ in range(9)],
    "a chunk": lambda cache: cache.append(tokens(70), tokens(70)),
    "a rollback": lambda cache: cache.truncate(cache.max_rollback(cache.seen - 2) or cache.seen),
    "a reset": lambda cache: (cache.reset(), cache.append(tokens(5), tokens(5))),
    "other rows": lambda cache: cache.reorder(torch.tensor([0])),
    "a restored session": lambda cache: cache.restore(cache.state(), torch.device("cpu")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CACHES)
def test_every_address_of_a_step_is_in_the_key(name, change):
    cache = CACHES[name]()
    cache.append(tokens(20), tokens(20))
    for _ in range(2):
        addresses, key = step(cache)
        assert addresses and addresses <= set(key)
        CHANGES[change](cache)
    addresses, key = step(cache)
    assert addresses <= set(key)


def test_storage_that_moves_changes_the_key():
    for make in CACHES.values():
        cache = make()
        cache.append(tokens(20), tokens(20))
        held, (_, before) = cache.state(), step(cache)
        kept = list(vars(cache).values())  # or new storage might get the address of the old one
        cache.restore(held, torch.device("cpu"))
        assert step(cache)[1] != before and kept
