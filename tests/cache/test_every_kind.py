"""Contracts of every kind of cache: exact bytes, padded batches, selection of rows."""

import pytest
import torch

from saccade.cache import DenseCache, QuantizedCache, QuantizedRing, RaggedCache, RingCache
from saccade.core import Mask
from saccade.ops import attend, attention, make_call
from tests.cache.test_contract import EXACT, qkv, run


def compressed_dense():
    cache, (_, k, v) = DenseCache(), qkv()
    cache.append(k, v)
    cache.keep(torch.arange(20).expand(2, 2, 20), room=70)
    return cache


def compressed_ragged():
    cache, (_, k, v) = RaggedCache(page_size=4), qkv()
    cache.append(k, v)
    cache.keep(torch.rand(2, 2, 60) < torch.tensor([0.1, 0.9])[:, None])
    return cache


def ring_with_checkpoints():
    cache, (_, k, v) = RingCache(window=9, checkpoints=3), qkv()
    for at in range(0, 60, 10):
        cache.append(k[:, :, at : at + 10], v[:, :, at : at + 10])
        cache.checkpoint()
    return cache


KINDS = {
    **{name: make for name, (make, _) in EXACT.items()},
    "int8": QuantizedCache,
    "int4": lambda: QuantizedCache(bits_k=4, bits_v=4, group=16, recent=8),
    "fp8": lambda: QuantizedCache(fp8=True, group=16, recent=8),
    "int8 ring": lambda: QuantizedRing(window=20, group=8, recent=2),
    "int4 ring": lambda: QuantizedRing(
        window=20, sinks=3, group=8, recent=2, bits_k=4, bits_v=4, checkpoints=2
    ),
    "compressed dense": compressed_dense,
    "compressed ragged": compressed_ragged,
    "ring with checkpoints": ring_with_checkpoints,
}


def storages(thing, found):
    """Bytes of every storage that an object refers to, by address."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for part in thing.values():
            storages(part, found)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            storages(part, found)
    elif hasattr(thing, "__dict__") and id(thing) not in found:
        found[id(thing)] = 0
        storages(vars(thing), found)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[30, 30], [1] * 40, [7, 1, 50]])
def test_nbytes_are_those_of_all_tensors_of_the_cache(kind, chunks):
    """Counted by walking over everything the cache refers to, after each kind of change."""
    cache, (_, k, v) = KINDS[kind](), qkv()
    at = 0
    for size in chunks:
        cache.append(k[:, :, at : at + size], v[:, :, at : at + size])
        at += size
        assert cache.nbytes == sum(storages(cache, {}).values())
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.nbytes == sum(storages(cache, {}).values())
    reached = cache.max_rollback(cache.seen - 1)
    cache.truncate(reached) if reached else cache.reset()
    assert cache.nbytes == sum(storages(cache, {}).values())
    cache.reset()
    assert cache.nbytes == sum(storages(cache, {}).values())


WINDOWS = {"int8 ring": Mask(window=20), "int4 ring": Mask(window=20, sinks=3)}


@pytest.mark.parametrize("kind", [*EXACT, "int8", "int4", "fp8", *WINDOWS])
def test_a_padded_batch_equals_single_rows(kind):
    """Left padding of another length in each row; the padded slots hold large values."""
    mask = EXACT[kind][1] if kind in EXACT else WINDOWS.get(kind, Mask())
    mask = Mask(window=mask.window)  # sinks would be slots of padding: `attach` refuses that
    q, k, v = qkv(dim=32)
    pads = torch.tensor([11, 0])
    padding = torch.arange(60)[None] >= pads[:, None]
    k[0, :, :11], v[0, :, :11] = 1e4, -1e4
    if "8" in kind or "4" in kind:  # real tokens share scales with padded ones
        k[0, :, :11], v[0, :, :11] = 0.5, -0.5
    cache, outs = KINDS[kind](), []
    for at in range(0, 60, 4):
        part = slice(at, at + 4)
        view = cache.append(k[:, :, part], v[:, :, part])
        call = {"mask": mask, "key_padding": padding[:, : at + 4]}
        outs.append(attend(make_call(q[:, :, part], view, **call)).out)
    ours = torch.cat(outs, 2)
    for row, pad in enumerate(pads.tolist()):
        alone = (x[row : row + 1, :, pad:] for x in (q, k, v))
        expected = attention(*alone, window=mask.window, backend="reference")
        error = (ours[row : row + 1, :, pad:] - expected).abs().max()
        bound = {"int8": 0.05, "int4": 0.5, "fp8": 0.3}.get(kind.removesuffix(" ring"), 1e-5)
        assert error < bound


@pytest.mark.parametrize("kind", KINDS)
def test_append_after_reorder(kind):
    """Rows are the selected ones, also where their number changes."""
    if "compressed" in kind or "checkpoints" in kind:
        pytest.skip("holds tokens from the start")
    mask = EXACT[kind][1] if kind in EXACT else WINDOWS.get(kind, Mask())
    data = qkv()
    straight, picked = KINDS[kind](), KINDS[kind]()
    for cache in (straight, picked):
        run(cache, mask, *(x[:, :, :40] for x in data), [4] * 10)
    rows = torch.tensor([1, 0, 1])
    picked.reorder(rows)
    rest = [x[:, :, 40:] for x in data]
    expected = run(straight, mask, *rest, [3] * 7)[rows]
    ours = run(picked, mask, *(x[rows] for x in rest), [3] * 7)
    assert torch.allclose(ours, expected, atol=1e-5)
