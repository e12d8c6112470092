"""Every kind of our caches as `past_key_values`: the interface of transformers' own caches."""

from __future__ import annotations

import pytest
import torch

from saccade.cache import (
    DenseCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RaggedCache,
    RingCache,
    make_layer_cache,
)
from saccade.core import Unsupported
from saccade.hf import KEY, SaccadeCache
from tests.tiny_models import WINDOW, tiny_config, tiny_model

FULL = {
    "dense": DenseCache,
    "paged": lambda: PagedCache(page_size=4),
    "ragged": RaggedCache,
    "int8": lambda: QuantizedCache(group=4, recent=4),
    "int4": lambda: QuantizedCache(bits_k=4, bits_v=4, group=4, recent=4),
    "fp8": lambda: QuantizedCache(fp8=True, group=4, recent=4),
    "long ring": lambda: RingCache(window=500),
}
EXACT = ("dense", "paged", "ragged", "long ring")
FAMILIES = ("llama", "gemma3", "gpt_oss")  # full, and two hybrids


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, tiny_model(tiny_config(name), KEY))


def cache_of(model, kind):
    """This kind in full layers; rings in sliding ones."""

    def make(layer, window):
        return FULL[kind]() if window is None else RingCache(window=window, checkpoints=4)

    return SaccadeCache(model.config, make)


def read(model, ids, cache):
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(5, dim=1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FULL)
def test_generate_takes_it(models, ids, padded, family, kind):
    model = models(family)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}):
        theirs = model.generate(
            ids, attention_mask=padded, max_new_tokens=8, do_sample=False, **options
        )
        cache = cache_of(model, kind)
        ours = model.generate(
            ids,
            attention_mask=padded,
            max_new_tokens=8,
            do_sample=False,
            past_key_values=cache,
            **options,
        )
        assert ours.shape == theirs.shape
        assert cache.get_seq_length() == cache.seen == 31
        if kind in EXACT:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FULL)
def test_reset(models, ids, family, kind):
    model = models(family)
    cache = cache_of(model, kind)
    first = read(model, ids, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(read(model, ids, cache), first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FULL)
def test_rows(models, ids, family, kind):
    """Reorder, repeat and select, then read on: the rows go on as they would have."""
    model = models(family)
    straight, moved = cache_of(model, kind), cache_of(model, kind)
    for cache in (straight, moved):
        read(model, ids[:, :14], cache)
    moved.reorder_cache(torch.tensor([1, 0]))
    moved.batch_repeat_interleave(2)  # 1 1 0 0
    moved.batch_select_indices(torch.tensor([3, 0, 1]))  # 0 1 1
    moved.batch_select_indices(torch.tensor([True, True, False]))
    expected = read(model, ids[:, 14:], straight)
    torch.testing.assert_close(read(model, ids[:, 14:], moved), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FULL)
def test_crop(models, ids, kind):
    """Speculative tokens are taken back; exact kinds then go on as if never read."""
    model = models("llama")
    cache = cache_of(model, kind)
    read(model, ids, cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 21
    again = read(model, ids[:, 21:], cache)
    expected = read(model, ids, cache_of(model, kind))[:, 21:]
    tolerance = 1e-5 if kind in EXACT else 0.5
    torch.testing.assert_close(again, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_hybrids_crop_to_where_their_rings_reach(models, ids, family):
    model = models(family)
    cache = cache_of(model, "dense")
    read(model, ids[:, :15], cache)
    for store in cache.stores:
        if isinstance(store, RingCache):
            store.checkpoint()
    read(model, ids[:, 15:], cache)
    assert not getattr(cache, "is_croppable", False)  # transformers asks before it speculates
    with pytest.raises(Unsupported, match=r"cannot go back to position 20.* at \[15\]"):
        cache.layers[0].crop(-4)
    cache.crop(-9)
    expected = read(model, ids, cache_of(model, "dense"))[:, 15:]
    again = read(model, ids[:, 15:], cache)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_prompts_that_begin_alike_share_pages(models, ids):
    """One pool a layer, several caches: what the first one read is not computed again."""
    model, prompt = models("llama"), ids[0].tolist()
    pools = [PagePool(page_size=4, grows=True) for _ in range(4)]

    def begin(tokens):
        cache = SaccadeCache(model.config, lambda layer, window: PagedCache(pools[layer]))
        found = {store.match_prefix(tokens[:-1]) for store in cache.stores}
        assert len(found) == 1
        return cache, found.pop()

    first, found = begin(prompt)
    assert found == 0
    read(model, ids[:1], first)
    other = [*prompt[:17], 5, 6, 7]
    second, found = begin(other)
    assert found == 16 == second.get_seq_length()
    ours = model(torch.tensor([other[found:]]), past_key_values=second).logits
    whole = model(torch.tensor([other])).logits[:, found:]
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_heads_of_different_lengths(models, ids, padded, family):
    """Ragged layers keep different numbers of tokens, also in a padded batch."""
    model = models(family)
    cache = cache_of(model, "ragged")
    model(ids, attention_mask=padded, past_key_values=cache)
    ragged = [store for store in cache.stores if isinstance(store, RaggedCache)]
    for share, store in enumerate(ragged, 2):
        kept = torch.arange(24) % share == 0
        kept = torch.stack([kept, kept.roll(1)]).expand(2, -1, -1)
        store.keep(kept | (torch.arange(24) > 20))
    mask = torch.cat((padded, torch.ones(2, 3, dtype=padded.dtype)), 1)
    out = model(ids[:, :3], attention_mask=mask, past_key_values=cache).logits
    assert out.isfinite().all() and cache.get_seq_length() == 27
    assert all(int(store.kv_lens.max()) < 20 for store in ragged)


def test_sizes_for_masks(models):
    """transformers builds masks from tokens seen, whatever is stored."""
    model = models("gemma3")
    cache = cache_of(model, "paged")
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.get_mask_sizes(5, 3) == (5, 0)
    kinds = [make_layer_cache(window=w) for w in (None, WINDOW)]
    assert [type(kind) for kind in kinds] == [DenseCache, RingCache]
