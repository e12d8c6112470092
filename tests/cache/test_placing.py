"""Tokens that are written to their places equal those that are appended, whatever comes between."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from saccade.cache import DenseCache, PlacingCache, QuantizedCache, QuantizedRing, RingCache
from saccade.core import DenseKV, Mask, QuantizedKV
from saccade.core.formats import QuantizedTensor
from saccade.ops import attend, make_call
from saccade.ops.kv_write.hadamard import hadamard_transform
from tests.cache.test_contract import qkv

CACHES = {
    "dense": (DenseCache, Mask()),
    "dense in float16": (lambda: DenseCache(dtype=torch.float16), Mask()),
    "ring": (lambda: RingCache(window=9), Mask(window=9)),
    "ring of chunks": (lambda: RingCache(window=9, sinks=3, chunk=4), Mask(window=9, sinks=3)),
    "int8": (lambda: QuantizedCache(group=8, recent=3), Mask()),
    "int4": (lambda: QuantizedCache(bits_k=4, bits_v=4, group=16, hadamard=False), Mask()),
    "int8 ring": (lambda: QuantizedRing(window=20, group=8, recent=3), Mask(window=20)),
    "int8 ring with sinks": (
        lambda: QuantizedRing(window=20, sinks=3, group=8, recent=3),
        Mask(window=20, sinks=3),
    ),
}


def filled(cache, place, count):
    """The view that queries of a step read, told by what a place says."""
    view, end = cache.storage(), place.slot + count
    if isinstance(view, DenseKV):
        return DenseKV(view.k, view.v, place.spans) if place.spans else _cut(view, end)
    history = place.position - place.slot
    k = QuantizedTensor(
        view.k.qdata[:, :, :history], *(x[:, :, : history // view.k_group] for x in view.k[1:])
    )
    v = QuantizedTensor(*(x[:, :, :history] for x in view.v))
    recent = view.recent_k[:, :, :end], view.recent_v[:, :, :end]
    return replace(view, k=k, v=v, recent_k=recent[0], recent_v=recent[1])


def _cut(view, end):
    return DenseKV(view.k[:, :, :end], view.v[:, :, :end])


def write(cache, k, v):
    """Keys and values to their places: what is read and from where, or None."""
    count = k.shape[2]
    place = cache.place(count, k.dtype)
    if place is None:
        return None
    view = cache.storage()
    quantized = isinstance(view, QuantizedKV)
    to_k, to_v = (view.recent_k, view.recent_v) if quantized else (view.k, view.v)
    assert to_k is place.parts[0] and to_v is place.parts[1]
    if view.hadamard:
        k, v = hadamard_transform(k), hadamard_transform(v)
    to_k[:, :, place.slot : place.slot + count] = k
    to_v[:, :, place.slot : place.slot + count] = v
    return filled(cache, place, count), place


def attended(q, view, place, mask):
    """What a step attends to: the view, and sinks before it."""
    if not place.sinks:
        return attend(make_call(q, view, mask=mask, q_offset=place.position)).out
    window = attend(make_call(q, view, mask=Mask(window=mask.window), q_offset=place.position))
    sinks = attend(make_call(q, DenseKV(*place.sinks), mask=Mask(causal=False)))
    share = (sinks.lse - window.lse).sigmoid()[..., None]
    return sinks.out * share + window.out * (1 - share)


def same_contents(a, b):
    a, b = a.state(), b.state()
    assert a.progress == b.progress
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


@pytest.mark.parametrize("sizes", [[1], [2, 1, 1], [3]])
@pytest.mark.parametrize("name", CACHES)
def test_written_tokens_equal_appended_ones(name, sizes):
    """Bit for bit, through groups, rings that go round and buffers that grow."""
    (make, mask), (q, k, v), at, placed = CACHES[name], qkv(200), 5, 0
    ours, theirs = make(), make()
    assert isinstance(ours, PlacingCache) and ours.place(1, k.dtype) is None
    for cache in (ours, theirs):
        cache.append(k[:, :, :at], v[:, :, :at])
    while at < 190:
        count = sizes[at % len(sizes)]
        new = slice(at, at + count)
        appended = theirs.append(k[:, :, new], v[:, :, new])
        expected = attend(make_call(q[:, :, new], appended, mask=mask)).out
        write(ours, k[:, :, new] * 3, v[:, :, new])  # begun, left and begun anew
        written = write(ours, k[:, :, new], v[:, :, new])
        if written is None:
            ours.append(k[:, :, new], v[:, :, new])
        else:
            found = attended(q[:, :, new], *written, mask)
            rounded = "with sinks" in name  # to float16, where what is appended is dequantized
            assert torch.allclose(found, expected, atol=1e-3 if rounded else 1e-6)
            ours.commit(count)
            placed += 1
        same_contents(ours, theirs)
        at += count
    assert placed or sizes != [1]


@pytest.mark.parametrize("name", CACHES)
def test_a_place_that_is_left_costs_no_more_than_a_token(name):
    """Whoever leaves a step unfinished can roll back exactly where a written token could."""
    (make, _), (_, k, v) = CACHES[name], qkv(200)
    left, appended = make(), make()
    for cache in (left, appended):
        cache.append(k[:, :, :60], v[:, :, :60])
    write(left, k[:, :, 60:61], v[:, :, 60:61])
    appended.append(k[:, :, 60:61], v[:, :, 60:61])
    for length in range(40, 61):
        assert left.max_rollback(length) == appended.max_rollback(length)
    length = appended.max_rollback(60)
    left.truncate(length)
    appended.truncate(length)
    same_contents(left, appended)


def test_parts_change_where_memory_moves():
    """Whoever keeps addresses compares the tensors of each place with those that it knows."""
    (_, k, v), known = qkv(200), []
    cache = QuantizedCache(group=8, recent=3)
    cache.append(k[:, :, :20], v[:, :, :20])
    for at in range(20, 60):
        place = cache.place(1, k.dtype)
        view = cache.storage()
        stored = view.recent_k, view.recent_v, *view.k, *view.v
        assert [x.data_ptr() for x in stored] == [x.data_ptr() for x in place.parts]
        known.append(place.parts)
        write(cache, k[:, :, at : at + 1], v[:, :, at : at + 1])
        cache.commit(1)
    kept = sum(all(x is y for x, y in zip(*two, strict=True)) for two in pairwise(known))
    assert 0 < kept < len(known) - 1


def test_several_tokens_of_full_precision_are_appended():
    """Their queries attend to them as they were given, which a buffer of 16 bits does not hold."""
    (_, k, v), cache = qkv(), QuantizedCache(group=8, recent=3)
    cache.append(k, v)
    assert cache.place(2, torch.float32) is None
    assert cache.place(2, torch.float16) is not None and cache.place(1, torch.float32) is not None
