"""Rollback: truncate, checkpoints of rings and context shift, against a run that never read on."""

import pytest
import torch

from saccade.cache import RaggedCache, RingCache
from saccade.core import Unsupported
from saccade.ops import attention
from tests.cache.test_contract import EXACT, cuts, qkv, run

RINGS = [name for name in EXACT if "ring" in name]


def ring(name, checkpoints):
    window = {"window": EXACT[name][1].window, "sinks": EXACT[name][1].sinks}
    return RingCache(**window, chunk=4, checkpoints=checkpoints), EXACT[name][1]


def continues_exactly_from(cache, mask, data, length):
    """Whether reading on from `length` gives what reading everything at once gives."""
    q, k, v = data
    rest = slice(length, None)
    ours = run(cache, mask, q[:, :, rest], k[:, :, rest], v[:, :, rest], [2] * 40)
    whole = attention(q, k, v, window=mask.window, sinks=mask.sinks, backend="reference")
    return torch.allclose(ours, whole[:, :, rest], atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("length", [0, 1, 20, 39, 40, 50])
def test_max_rollback_is_what_truncate_accepts(name, length):
    make, mask = EXACT[name]
    cache, data = make(), qkv()
    run(cache, mask, *(x[:, :, :40] for x in data), [4] * 10)
    reached = cache.max_rollback(length)
    assert reached <= min(length, 40)
    if length >= 40:
        assert reached == 40
    if "ring" not in name or "long" in name:
        assert reached == min(length, 40)
    cache.truncate(reached) if reached else cache.reset()
    assert cache.seen == reached and continues_exactly_from(cache, mask, data, reached)


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("every", [1, 5, 7, 30])
def test_rollback_to_a_checkpoint_is_exact(name, every):
    cache, mask = ring(name, 8)
    data = qkv()
    for part in cuts([every], 50):
        run(cache, mask, *(x[:, :, cache.seen : cache.seen + part] for x in data), [part])
        cache.checkpoint()
    positions = list(cache._checkpoints.kept)
    assert positions[-1] == 50 and len(positions) == min(8, -(-50 // every))
    for at in reversed(positions):
        assert cache.max_rollback(at) == at
        cache.truncate(at)
        assert cache.seen == at
        assert continues_exactly_from(cache, mask, data, at)


def test_checkpoints_take_a_window_each_and_are_thinned_out():
    cache, data = RingCache(window=9, chunk=4, checkpoints=3), qkv()
    sizes, kept = [], []
    for at in range(0, 48, 4):
        cache.append(*(x[:, :, at : at + 4] for x in data[1:]))
        cache.checkpoint()
        sizes.append(cache.nbytes)
        kept.append(list(cache._checkpoints.kept))
    ring, slot = 12, 2 * 2 * 2 * 16 * 4
    assert sizes[0] == (ring + 4) * slot and sizes[2] == (ring + 4 + 8 + 8) * slot
    assert sizes[-1] == (ring + 3 * 8) * slot
    assert [positions[-1] for positions in kept] == list(range(4, 52, 4))
    gaps = torch.tensor([0, *kept[-1]]).diff()
    assert gaps.max() <= 2 * 48 / 3  # spread out, not all at the end


def test_rollback_removes_later_checkpoints():
    cache, mask = ring("ring", 4)
    data = qkv()
    for at in range(0, 40, 10):
        run(cache, mask, *(x[:, :, at : at + 10] for x in data), [10])
        cache.checkpoint()
    cache.truncate(20)
    assert cache.max_rollback(40) == 20 and cache.max_rollback(15) == 10
    with pytest.raises(Unsupported, match=r"its checkpoints are at \[10, 20\]"):
        cache.truncate(5)
    cache.reorder(torch.tensor([1, 1]))
    cache.truncate(10)
    other = tuple(x[[1, 1]] for x in data)
    assert continues_exactly_from(cache, mask, other, 10)
    cache.reset()
    assert cache.max_rollback(40) == 0


def test_compressed_caches_roll_back_to_their_compression():
    cache, (_, k, v) = RaggedCache(), qkv()
    cache.append(k, v)
    cache.keep(torch.rand(2, 2, 60) < 0.5)
    cache.append(k[:, :, :5], v[:, :, :5])
    assert (
        cache.max_rollback(62) == 62
        and cache.max_rollback(60) == 60
        and cache.max_rollback(59) == 0
    )


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("case", [(50, 4, 20), (50, 4, 40), (30, 3, 28), (12, 5, 7)])
def test_context_shift_of_a_ring(sinks, case):
    """Keys hold their own position: those still in the window moved down."""
    cache, (read, start, stop) = RingCache(window=9, sinks=sinks, chunk=4, checkpoints=2), case
    at = torch.arange(60.0).view(1, 1, 60, 1).expand(1, 1, 60, 2)
    for i in range(0, read, 2):
        cache.append(at[:, :, i : i + 2], at[:, :, i : i + 2])
        cache.checkpoint()
    cache.context_shift(start, stop, lambda keys, delta: keys + delta)
    assert cache.seen == read - (stop - start)
    new = at[:, :, :2] + cache.seen
    view = cache.append(new, new)
    positions = [
        p for span in view.spans for p in range(span.position, span.position + span.length)
    ]
    keys = torch.cat([view.k[0, 0, s.slot : s.slot + s.length, 0] for s in view.spans])
    values = torch.cat([view.v[0, 0, s.slot : s.slot + s.length, 0] for s in view.spans])
    assert keys.tolist() == positions  # re-rotated to their new positions
    before = [p if p < start or p >= cache.seen - 2 else p + stop - start for p in positions]
    assert values.tolist() == before
    needed = range(max(0, cache.seen - 10), cache.seen)
    if read - stop >= 8:  # enough followed the gap to fill the window
        assert set(needed) <= set(positions)
    assert set(range(sinks)) <= set(positions)
