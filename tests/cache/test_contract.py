"""The contract of layer caches: whatever the chunking, attention equals that over all keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.cache import (
    DenseCache,
    OffloadedCache,
    PagedCache,
    QuantizedCache,
    QuantizedRing,
    RaggedCache,
    RingCache,
    StagingBuffers,
    make_layer_cache,
    snapshot,
)
from saccade.core import BadInput, Mask, Unsupported
from saccade.ops import attend, attention, make_call
from saccade.ops.kv_write.hadamard import hadamard_transform

EXACT = {
    "dense": (DenseCache, Mask()),
    "ring": (lambda: RingCache(window=9, chunk=4), Mask(window=9)),
    "ring with sinks": (lambda: RingCache(window=9, sinks=3, chunk=4), Mask(window=9, sinks=3)),
    "ring of one": (lambda: RingCache(window=1, chunk=1), Mask(window=1)),
    "paged": (lambda: PagedCache(page_size=4), Mask()),
    "paged in large pages": (PagedCache, Mask()),
    "ragged": (RaggedCache, Mask()),
    "offloaded": (lambda: OffloadedCache(StagingBuffers()), Mask()),
    "long ring": (lambda: RingCache(window=300, sinks=2, chunk=8), Mask(window=300, sinks=2)),
}
LENGTH = 60


def qkv(length=LENGTH, batch=2, dim=16):
    return (
        torch.randn(batch, 4, length, dim),
        torch.randn(batch, 2, length, dim),
        torch.randn(batch, 2, length, dim),
    )


def rounding(bits, group=64):
    """What quantizing normal numbers adds to them (rms): a uniform error of one step."""
    x = torch.randn(20_000, group)
    return ((x.amax(1) - x.amin(1)).square().mean() / 12).sqrt() / (2**bits - 1)


def run(cache, mask, q, k, v, chunks):
    """Append and attend chunk by chunk; the outputs, concatenated."""
    outs, at = [], cache.seen
    start = at
    for size in chunks:
        stop = min(at + size, start + q.shape[2])
        part = slice(at - start, stop - start)
        view = cache.append(k[:, :, part], v[:, :, part])
        outs.append(attend(make_call(q[:, :, part], view, mask=mask)).out)
        at = stop
    return torch.cat(outs, dim=2)


def cuts(sizes, length):
    """Chunk sizes that cover the length, repeating what was drawn."""
    total, out = 0, []
    while total < length:
        out.append(min(sizes[len(out) % len(sizes)], length - total))
        total += out[-1]
    return out


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_chunked_equals_whole(name, sizes):
    make, mask = EXACT[name]
    q, k, v = qkv()
    expected = attention(q, k, v, window=mask.window, sinks=mask.sinks, backend="reference")
    ours = run(make(), mask, q, k, v, cuts(sizes, LENGTH))
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_reset_and_reuse(name):
    make, mask = EXACT[name]
    cache, (q, k, v) = make(), qkv()
    first = run(cache, mask, q, k, v, [7] * 9)
    bytes_before = cache.nbytes
    cache.reset()
    assert cache.seen == 0
    assert torch.equal(run(cache, mask, q, k, v, [7] * 9), first)
    assert cache.nbytes == bytes_before


@pytest.mark.parametrize("name", EXACT)
def test_reorder(name):
    make, mask = EXACT[name]
    cache, (q, k, v) = make(), qkv()
    run(cache, mask, q[:, :, :30], k[:, :, :30], v[:, :, :30], [7] * 5)
    cache.reorder(torch.tensor([1, 1]))
    view = cache.append(
        k[1:, :, 30:33].expand(2, -1, -1, -1), v[1:, :, 30:33].expand(2, -1, -1, -1)
    )
    ours = attend(make_call(q[1:, :, 30:33].expand(2, -1, -1, -1), view, mask=mask)).out
    whole = attention(q, k, v, window=mask.window, sinks=mask.sinks, backend="reference")
    assert torch.allclose(ours, whole[1:, :, 30:33].expand(2, -1, -1, -1), atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("back", [1, 3, 5])
def test_truncate_is_exact_or_refused(name, back):
    """As if the tokens had never been read; refused where the window is overwritten."""
    make, mask = EXACT[name]
    cache, (q, k, v) = make(), qkv()
    run(cache, mask, q[:, :, :40], k[:, :, :40], v[:, :, :40], [4] * 10)
    try:
        cache.truncate(40 - back)
    except Unsupported as error:
        assert isinstance(cache, RingCache) and "cannot go back" in str(error)
        return
    assert cache.seen == 40 - back
    rest = slice(40 - back, None)
    ours = run(cache, mask, q[:, :, rest], k[:, :, rest], v[:, :, rest], [2] * 40)
    whole = attention(q, k, v, window=mask.window, sinks=mask.sinks, backend="reference")
    assert torch.allclose(ours, whole[:, :, rest], atol=1e-5)


CLOSE = {
    "int8": (QuantizedCache, Mask()),
    "int8 ring": (lambda: QuantizedRing(window=50), Mask(window=50)),
    "int4 ring with sinks": (
        lambda: QuantizedRing(window=50, sinks=3, bits_k=4, bits_v=4),
        Mask(window=50, sinks=3),
    ),
}


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_a_restored_state_continues_as_the_original(name):
    make, mask = (EXACT | CLOSE)[name]
    cache, (q, k, v) = make(), qkv(200)
    run(cache, mask, q[:, :, :150], k[:, :, :150], v[:, :, :150], [4] * 38)
    state, copy = cache.state(), make()
    snapshot.restore(copy, snapshot.kind_of(cache), state, torch.device("cpu"))
    assert copy.seen == 150 and copy.nbytes <= cache.nbytes
    rest = [x[:, :, 150:] for x in (q, k, v)]
    assert torch.equal(run(copy, mask, *rest, [3] * 20), run(cache, mask, *rest, [3] * 20))


def test_states_of_other_caches_are_refused():
    state = DenseCache().state()
    with pytest.raises(BadInput, match="a dense cache where this context has a ring one"):
        snapshot.check(RingCache(window=4), "dense", state)
    state = RingCache(window=4).state()
    with pytest.raises(BadInput, match="saved with window=4 in a ring cache, this context has 8"):
        snapshot.check(RingCache(window=8), "ring", state)
    state.progress["oldest"] = -1
    with pytest.raises(
        BadInput, match="impossible counts for a ring cache: expected seen, oldest of 0 or more"
    ):
        snapshot.check(RingCache(window=4), "ring", state)
    with pytest.raises(Unsupported, match="a str cannot be saved"):
        snapshot.kind_of("x")


def test_ring_rolls_back_by_its_extra_slots():
    """A ring holds chunk - 1 tokens more than a window after a full chunk."""
    cache, (_, k, v) = RingCache(window=9, chunk=4), qkv()
    for at in range(0, 40, 4):
        cache.append(k[:, :, at : at + 4], v[:, :, at : at + 4])
    cache.truncate(36)
    with pytest.raises(Unsupported, match="holds positions 28 to 35 and needs the 9 before"):
        cache.truncate(35)


class TestRing:
    def test_memory_is_constant_and_one_slot_is_written_per_token(self):
        cache = RingCache(window=8, sinks=2, chunk=4)
        _, k, v = qkv(200)
        cache.append(k[:, :, :4], v[:, :, :4])
        size = cache.nbytes
        originals = 2  # of the sinks' keys, which are moved in texts beyond the trained length
        assert size == 2 * 2 * (2 * (2 + 7 + 4) + originals) * 16 * 4
        address = cache.append(k[:, :, 4:5], v[:, :, 4:5]).k.data_ptr()
        for i in range(5, 200):
            before = cache._k.view(torch.int32).clone()  # empty slots may hold NaN
            view = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            assert (before != cache._k.view(torch.int32)).any(-1).any(1).any(0).sum() == 1
            assert view.k.data_ptr() == address
        assert cache.nbytes == size

    def test_large_chunks_do_not_grow_it(self):
        cache, (_, k, v) = RingCache(window=8, chunk=4), qkv()
        cache.append(k[:, :, :4], v[:, :, :4])
        size = cache.nbytes
        cache.append(k[:, :, 4:], v[:, :, 4:])
        assert cache.nbytes == size and cache.seen == LENGTH

    def test_errors(self):
        with pytest.raises(ValueError, match="window >= 1, sinks >= 0, chunk >= 1 and .* got 0"):
            RingCache(window=0)
        with pytest.raises(Unsupported, match="keeps its 2 sinks"):
            RingCache(window=4, sinks=2).context_shift(1, 3, lambda k, d: k)


class TestDense:
    def test_reserve_allocates_once(self):
        cache, (_, k, v) = DenseCache(reserve=1000), qkv()
        cache.append(k, v)
        assert cache.nbytes == 2 * 2 * 2 * 1000 * 16 * 4

    def test_keep_frees_memory_and_attention_reads_the_kept_keys(self):
        cache, (_, k, v) = DenseCache(), qkv(700)
        cache.append(k, v)
        before = cache.nbytes
        index = torch.stack([torch.randperm(700)[:100].sort().values for _ in range(4)])
        index = index.view(2, 2, 100)
        cache.keep(index, room=4)
        assert cache.nbytes == before // 704 * 104 and cache.seen == 700
        new = qkv(3)
        view = cache.append(new[1], new[2])
        ours = attend(make_call(new[0], view, mask=Mask())).out
        spread = index[..., None].expand(-1, -1, -1, 16)
        kept_k = torch.cat((k.gather(2, spread), new[1]), 2)
        kept_v = torch.cat((v.gather(2, spread), new[2]), 2)
        expected = attention(new[0], kept_k, kept_v, backend="reference")
        assert torch.allclose(ours, expected, atol=1e-5)

    def test_keeping_everything_changes_nothing(self):
        cache, (_, k, v) = DenseCache(), qkv()
        cache.append(k, v)
        cache.keep(torch.arange(LENGTH).expand(2, 2, LENGTH))
        assert torch.equal(cache.view().k, k) and torch.equal(cache.view().v, v)

    def test_compressed_caches_refuse_rollback_and_shift(self):
        cache, (_, k, v) = DenseCache(), qkv()
        cache.append(k, v)
        cache.keep(torch.arange(10).expand(2, 2, 10))
        with pytest.raises(Unsupported, match="a compressed cache cannot go back to position 5"):
            cache.truncate(5)
        with pytest.raises(Unsupported, match="cannot be shifted"):
            cache.context_shift(2, 4, lambda k, d: k)

    def test_context_shift_moves_and_rotates_later_keys(self):
        cache, (_, k, v) = DenseCache(), qkv(20)
        cache.append(k, v)
        cache.context_shift(4, 10, lambda keys, delta: keys + delta)
        view = cache.view()
        assert cache.seen == 14
        assert torch.equal(view.k[:, :, :4], k[:, :, :4])
        assert torch.equal(view.k[:, :, 4:], k[:, :, 10:] - 6)
        assert torch.equal(view.v[:, :, 4:], v[:, :, 10:])

    def test_storage_type(self):
        cache, (q, k, v) = DenseCache(dtype=torch.bfloat16), qkv()
        view = cache.append(k, v)
        assert view.dtype == torch.bfloat16
        out = attend(make_call(q, view, mask=Mask())).out
        assert (out - attention(q, k, v)).abs().max() < 0.05


class TestQuantized:
    @pytest.mark.parametrize(
        ("bits", "fp8", "bound"), [(8, False, 0.006), (4, False, 0.09), (8, True, 0.03)]
    )
    @pytest.mark.parametrize("hadamard", [True, False])
    @pytest.mark.parametrize("chunks", [[500], [1], [64], [37, 200, 3]])
    def test_error_stays_within_its_bound(self, bits, fp8, bound, hadamard, chunks):
        q, k, v = qkv(500, dim=64)
        cache = QuantizedCache(bits_k=bits, bits_v=bits, hadamard=hadamard, fp8=fp8)
        ours = run(cache, Mask(), q, k, v, cuts(chunks, 500))
        exact = attention(q, k, v, backend="reference")
        assert (ours - exact).norm() / exact.norm() < bound

    @pytest.mark.parametrize(("chunks", "bound"), [([60], 1e-5), ([1] * 60, 2e-3)])
    def test_tokens_are_exact_in_their_chunk_and_then_wait_in_16_bits(self, chunks, bound):
        q, k, v = qkv(60, dim=64)
        cache = QuantizedCache(bits_k=4, bits_v=4)
        ours = run(cache, Mask(), q, k, v, chunks)
        assert torch.allclose(ours, attention(q, k, v), atol=bound)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_waiting_tokens_keep_a_16_bit_type_and_float32_becomes_float16(self, dtype):
        _, k, v = (x.to(dtype) for x in qkv(20, dim=64))
        cache = QuantizedCache(hadamard=False)
        cache.append(k, v)
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        assert torch.equal(cache.recent.filled[0], k.to(kept))

    def test_a_float32_token_beyond_float16_is_refused(self):
        _, k, v = qkv(2, dim=64)
        cache = QuantizedCache(hadamard=False)
        cache.append(k[:, :, :1], v[:, :, :1])
        with pytest.raises(ValueError, match="between 6.1e-05 and 65504.* got 1e"):
            cache.append(k[:, :, 1:] * 0 + 1e5, v[:, :, 1:])
        assert cache.seen == 1

    def test_bytes(self):
        _, k, v = qkv(64 * 33, dim=64)
        cache = QuantizedCache(reserve=64 * 33)
        cache.append(k, v)
        cache.append(k[:, :, :1], v[:, :, :1])
        rows = 2 * 2
        qdata = 2 * rows * 2048 * 64
        scales = 2 * rows * 2 * (2048 // 64 * 64 + 2048)
        recent = 2 * rows * 72 * 64 * 2  # 65 tokens of two bytes a number
        assert cache.nbytes == qdata + scales + recent

    @pytest.mark.parametrize(("bits", "most"), [(8, 0.56), (4, 0.31)])
    @pytest.mark.parametrize("device", ["meta", "cpu"])
    def test_share_of_the_bytes_of_float16_at_2048_tokens_and_more(self, bits, most, device):
        """At every length, room that is allocated ahead and tokens that wait included."""
        cache = QuantizedCache(bits_k=bits, bits_v=bits)
        for size in (512, 512, 512, 511, *[1] * (260 if device == "meta" else 80)):
            new = torch.zeros(1, 1, size, 128, device=device)
            cache.append(new, new)
            assert cache.seen < 2048 or cache.nbytes <= most * cache.seen * 2 * 128 * 2

    def test_reorder_and_truncate(self):
        q, k, v = qkv(300, dim=64)
        cache = QuantizedCache()
        run(cache, Mask(), q, k, v, [100, 100, 100])
        cache.reorder(torch.tensor([1, 0]))
        cache.truncate(cache.seen - 5)
        view = cache.append(k.flip(0)[:, :, 295:], v.flip(0)[:, :, 295:])
        ours = attend(make_call(q.flip(0)[:, :, 295:], view, mask=Mask())).out
        exact = attention(q, k, v).flip(0)[:, :, 295:]
        assert (ours - exact).norm() / exact.norm() < 0.01

    @pytest.mark.parametrize("length", [299, 200, 128, 100, 3])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_truncate_dequantizes_a_cut_group(self, bits, length):
        q, k, v = qkv(420, dim=64)
        cache = QuantizedCache(bits_k=bits, bits_v=bits)
        run(cache, Mask(), *(x[:, :, :300] for x in (q, k, v)), [100, 100, 100])
        cache.truncate(length)
        assert cache.seen == length
        rest = (x[:, :, length:] for x in (q, k, v))
        ours = run(cache, Mask(), *rest, [30] * 14)
        exact = attention(q, k, v)[:, :, length:]
        # Scores have a variance of 1: keys' errors change weights by as much as values' the output.
        assert (ours - exact).norm() / exact.norm() < 2**0.5 * rounding(bits)

    @pytest.mark.parametrize("kind", [{}, {"bits_k": 4, "bits_v": 4}, {"fp8": True}])
    def test_context_shift_moves_and_rotates_later_keys(self, kind):
        """Like a dense cache, with two errors of the keys' format and one of the values', which are
        rounded to the same steps again; recent tokens stay exact."""
        q, k, v = qkv(420, dim=64)
        ours, plain = QuantizedCache(group=32, **kind), DenseCache()
        for cache in (ours, plain):
            run(cache, Mask(), *(x[:, :, :400] for x in (q, k, v)), [100] * 4)
            cache.context_shift(10, 150, lambda keys, delta: -keys)
        assert ours.seen == plain.seen == 260
        recent = ours.append(*(x[:, :, 400:] for x in (k, v)))
        exact = plain.append(*(x[:, :, 400:] for x in (k, v)))
        bits = kind.get("bits_k", 8)
        most = 2 * rounding(bits, 32) ** 2 + rounding(bits) ** 2
        step = 0.05 if "fp8" in kind else most**0.5
        out, expected = (
            attend(make_call(q[:, :, 400:], view, mask=Mask())).out for view in (recent, exact)
        )
        assert (out - expected).norm() / expected.norm() < step
        assert torch.allclose(
            hadamard_transform(recent.recent_k)[:, :, -20:], exact.k[:, :, -20:], atol=1e-5
        )

    def test_errors(self):
        with pytest.raises(ValueError, match="fp8 needs 8 bits, got bits_k=4 and bits_v=8"):
            QuantizedCache(bits_k=4, fp8=True)
        with pytest.raises(ValueError, match="bits_k must be 4 or 8, got 3"):
            QuantizedCache(bits_k=3)


def test_make():
    assert isinstance(make_layer_cache(), DenseCache)
    assert isinstance(make_layer_cache(window=8), RingCache)
    assert isinstance(make_layer_cache(page_size=16), PagedCache)
    assert isinstance(make_layer_cache(ragged=True), RaggedCache)
    assert isinstance(make_layer_cache(staging=StagingBuffers()), OffloadedCache)
    assert isinstance(make_layer_cache(ragged=True, window=8), RingCache)
    assert isinstance(make_layer_cache(type_k="int8", type_v="int4"), QuantizedCache)
    assert make_layer_cache(type_k="fp8", type_v="fp8").state().settings["fp8"] is True
    assert isinstance(make_layer_cache(window=8, type_k="int8", type_v="int8"), RingCache)
    ring = make_layer_cache(window=128, sinks=3, checkpoints=2, type_k="int8", type_v="int4")
    assert isinstance(ring, QuantizedRing) and ring.most_checkpoints == 2
    assert ring.state().settings.items() >= {"window": 128, "sinks": 3, "bits_v": 4}.items()
    cache = make_layer_cache(type_k="bf16", type_v="bf16")
    _, k, v = qkv()
    assert cache.append(k, v).dtype == torch.bfloat16
