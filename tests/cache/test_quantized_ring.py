"""Quantized rings: a window in 8 or 4 bits, against attention over all keys in full precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saccade.cache import Cursor, QuantizedRing, RingCache
from saccade.core import BlockSelection, DenseKV, Mask, QuantizedKV, Unsupported
from saccade.ops import attend, attention, make_call
from tests.cache.test_contract import cuts, qkv, run

WINDOW, LENGTH = 50, 300
KINDS = {
    "int8": ({}, 0.008),
    "int4": ({"bits_k": 4, "bits_v": 4}, 0.12),
    "int8 keys, int4 values": ({"bits_v": 4}, 0.12),
    "fp8": ({"fp8": True}, 0.04),
}


def ring(sinks=0, checkpoints=0, **kind):
    options = {"group": 16, "recent": 4} | kind
    return QuantizedRing(window=WINDOW, sinks=sinks, checkpoints=checkpoints, **options)


def error(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [0, 3, 40])
@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(1, 120), min_size=1, max_size=5))
def test_chunks_of_any_size_attend_to_window_and_sinks(kind, sinks, sizes):
    made, bound = KINDS[kind]
    q, k, v = qkv(LENGTH, dim=64)
    mask = Mask(window=WINDOW, sinks=sinks)
    ours = run(ring(sinks, **made), mask, q, k, v, cuts(sizes, LENGTH))
    exact = attention(q, k, v, window=WINDOW, sinks=sinks, backend="reference")
    assert error(ours, exact) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens(dtype):
    q, k, v = (x.to(dtype) for x in qkv(LENGTH, dim=64))
    ours = run(ring(2), Mask(window=WINDOW, sinks=2), q, k, v, [1] * LENGTH)
    assert error(ours, attention(q, k, v, window=WINDOW, sinks=2, backend="reference")) < 0.015


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("extra", ["padding", "attn_mask", "slopes", "blocks"])
def test_a_view_behind_position_0_takes_every_mask(extra, backend):
    """All backends see true positions: columns of masks, slopes and blocks of keys."""
    q, k, v = qkv(LENGTH, dim=64)
    cache = ring()
    for at in range(0, LENGTH, 10):
        view = cache.append(k[:, :, at : at + 10], v[:, :, at : at + 10])
    assert isinstance(view, QuantizedKV) and view.first > 200 and view.shape[2] == LENGTH
    seen = torch.rand(2, LENGTH) < 0.7
    pairs = torch.rand(2, 4, 10, LENGTH) < 0.7
    blocks = torch.rand(2, 2, 1, -(-LENGTH // 16)) < 0.7
    blocks[..., -1] = True
    given = {
        "padding": {"key_padding": seen},
        "attn_mask": {"attn_mask": pairs},
        "slopes": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        "blocks": {"blocks": BlockSelection(allowed=blocks, q_block=16, k_block=16)},
    }[extra]
    mask = Mask(window=WINDOW)
    ours = attend(make_call(q[:, :, -10:], view, mask=mask, **given), backend=backend)
    whole = make_call(q[:, :, -10:], DenseKV(k, v), mask=mask, **given)
    assert error(ours.out, attend(whole, backend="reference").out) < 0.02


def test_a_large_chunk_leaves_its_view_as_it_was():
    """Groups move down in storage while the view of the chunk is still to be read."""
    q, k, v = qkv(LENGTH, dim=64)
    cache, mask = ring(), Mask(window=WINDOW)
    for at in (0, 90):
        view = cache.append(k[:, :, at : at + 90], v[:, :, at : at + 90])
    ours = attend(make_call(q[:, :, 90:180], view, mask=mask)).out
    exact = attention(q[:, :, :180], k[:, :, :180], v[:, :, :180], window=WINDOW)[:, :, 90:]
    assert error(ours, exact) < 0.008


def test_memory_is_constant_and_what_its_formula_says():
    """A window of 512 and 256 channels: groups of 32 tokens, and up to 40 that wait."""
    sizes = set()
    cache = QuantizedRing(window=512)
    k = torch.randn(1, 1, 700, 256)
    cache.append(k, k)
    for _ in range(100):
        cache.append(k[:, :, :1], k[:, :, :1])
        sizes.add(cache.nbytes)
    groups = 512 * 2 * 256 + 4 * 512 * 256 // 32 + 4 * 512 * 256 // 32
    assert sizes == {groups + 2 * slots * 256 * 2 for slots in (16, 32, 40)}
    assert max(sizes) < 0.65 * 512 * 2 * 256 * 2, "of a ring in float16"


def test_narrow_windows_and_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="window of at least group \\+ recent = 40.* got 39, 0"):
        QuantizedRing(window=39)
    with pytest.raises(ValueError, match="sinks >= 0 and checkpoints >= 0, got 50, -1 and 0"):
        QuantizedRing(window=50, sinks=-1)
    with pytest.raises(ValueError, match="bits_k must be 4 or 8, got 3"):
        QuantizedRing(window=50, bits_k=3)


def test_a_refused_token_changes_nothing():
    q, k, v = qkv(LENGTH, dim=64)
    cache, mask = ring(3), Mask(window=WINDOW, sinks=3)
    with pytest.raises(ValueError, match="takes keys of magnitudes"):
        cache.append(k[:, :, :9] * 1e9, v[:, :, :9])
    assert cache.seen == 0
    run(cache, mask, *(x[:, :, :200] for x in (q, k, v)), [40] * 5)
    for size in (1, 70):
        with pytest.raises(ValueError, match="takes values of magnitudes"):
            cache.append(k[:, :, :size], v[:, :, :size] * 1e9)
    rest = [x[:, :, 200:] for x in (q, k, v)]
    ours = run(cache, mask, *rest, [10] * 10)
    exact = attention(q, k, v, window=WINDOW, sinks=3)[:, :, 200:]
    assert error(ours, exact) < 0.008


def test_an_interrupt_while_groups_move_leaves_them_whole(monkeypatch):
    q, k, v = qkv(LENGTH, dim=64)
    cache, mask = ring(), Mask(window=WINDOW)
    run(cache, mask, *(x[:, :, :200] for x in (q, k, v)), [1] * 200)
    stored = cache.groups.append

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.groups, "append", interrupted)
    read = 0
    with pytest.raises(KeyboardInterrupt):
        while True:
            cache.append(k[:, :, 200 + read :][:, :, :1], v[:, :, 200 + read :][:, :, :1])
            read += 1
    monkeypatch.setattr(cache.groups, "append", stored)
    assert cache.seen == 200 + read
    ours = run(cache, mask, *(x[:, :, 200 + read :] for x in (q, k, v)), [1] * 100)
    exact = attention(q, k, v, window=WINDOW)[:, :, 200 + read :]
    assert error(ours, exact) < 0.008


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_what_appending_reads(dtype):
    """Positions on the device: the view of a step begins at the oldest group."""
    q, k, v = (x.to(dtype) for x in qkv(LENGTH, dim=64))
    stepped, appended, mask = ring(), ring(), Mask(window=WINDOW)
    for cache in (stepped, appended):
        run(cache, mask, *(x[:, :, :170] for x in (q, k, v)), [170])
    for at in range(170, 260):
        new = [x[:, :, at : at + 1] for x in (q, k, v)]
        stepped.reserve(1)
        start = torch.full((2,), at)
        view, cursor, _ = stepped.write(*new[1:], Cursor(start, start + 1), None)
        call = make_call(new[0], view, mask=mask, q_offset=cursor.start, kv_lens=cursor.stop)
        ours = attend(call).out
        stepped.commit(1)
        expected = attend(make_call(new[0], appended.append(*new[1:]), mask=mask)).out
        assert torch.allclose(ours, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert stepped.seen == appended.seen == 260


def test_a_ring_with_sinks_is_not_stepped():
    cache, (_, k, v) = ring(2), qkv(dim=64)
    cache.append(k, v)
    with pytest.raises(Unsupported, match="cannot be stepped: its window is dequantized"):
        cache.reserve(1)


def test_sinks_are_moved_from_their_originals():
    """Keys are their position: moved sinks are where a RingCache has them, and saved unmoved."""
    at = torch.arange(400.0).view(1, 1, 400, 1).expand(1, 1, 400, 16).contiguous()
    kept = []
    for cache in (ring(3, hadamard=False), RingCache(window=WINDOW, sinks=3)):
        cache.places.reach = 200
        cache.places.shift = lambda keys, delta: keys + delta
        for i in range(0, 400, 10):
            view = cache.append(at[:, :, i : i + 10], at[:, :, i : i + 10])
        kept.append(view.k[0, 0, :3, 0])
        if isinstance(cache, QuantizedRing):
            assert cache.state().tensors["sinks.k"][0, 0, :, 0].tolist() == [0, 1, 2]
    assert torch.equal(kept[0], kept[1]) and kept[0][0] > 200


class Rings(RuleBasedStateMachine):
    """Any order of operations, against attention over the tokens that are left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sinks = 2
        self.cache = ring(self.sinks, checkpoints=3)
        self.q, self.k, self.v = (torch.empty(1, 2, 0, 64) for _ in range(3))

    @rule(count=st.sampled_from([1, 1, 2, 15, 16, 40, 90]))
    def append(self, count):
        new = [torch.randn(1, 2, count, 64) for _ in range(3)]
        self.q, self.k, self.v = (
            torch.cat((x, y), 2) for x, y in zip((self.q, self.k, self.v), new, strict=True)
        )
        view = self.cache.append(*new[1:])
        mask = Mask(window=WINDOW, sinks=self.sinks)
        ours = attend(make_call(new[0], view, mask=mask)).out
        exact = attention(self.q, self.k, self.v, window=WINDOW, sinks=self.sinks, backend="tiled")
        assert error(ours, exact[:, :, -count:]) < 0.02

    @rule()
    def checkpoint(self):
        self.cache.checkpoint()

    @precondition(lambda self: self.cache.seen)
    @rule(back=st.integers(1, 120))
    def roll_back(self, back):
        length = self.cache.max_rollback(max(0, self.cache.seen - back))
        self.cache.truncate(length) if length else self.cache.reset()
        self.q, self.k, self.v = (x[:, :, :length] for x in (self.q, self.k, self.v))

    @precondition(lambda self: self.cache.seen)
    @rule()
    def save_and_restore(self):
        state = self.cache.state()
        tensors = {name: x.clone() for name, x in state.tensors.items()}
        self.cache = ring(self.sinks, checkpoints=3)
        self.cache.restore(state._replace(tensors=tensors), torch.device("cpu"))

    @precondition(lambda self: self.cache.seen >= 100)
    @rule(start=st.integers(2, 20), count=st.integers(1, 20))
    def shift(self, start, count):
        self.cache.context_shift(start, start + count, lambda keys, delta: keys)
        self.q, self.k, self.v = (
            torch.cat((x[:, :, :start], x[:, :, start + count :]), 2)
            for x in (self.q, self.k, self.v)
        )

    @invariant()
    def counts_agree(self):
        assert self.cache.seen == self.k.shape[2]


Rings.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestRings = Rings.TestCase
