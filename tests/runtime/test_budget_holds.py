"""A kv_policy while a prompt is read and while tokens are generated: memory and results."""

from itertools import product

import pytest
import torch

import saccade
from saccade.cache import DenseCache, RaggedCache
from saccade.compress import POLICIES
from saccade.runtime import ContextParams
from tests.tiny_models import tiny_config, tiny_model

PROMPT = torch.arange(400) * 37 % 113 + 3


@pytest.fixture(scope="module")
def llama():
    return tiny_model(tiny_config("llama"))


@pytest.fixture
def most_bytes(monkeypatch):
    """The largest size of each cache, noted whenever tokens were stored or keys removed."""
    most = {}

    def counting(method):
        def counted(self, *args, **options):
            result = method(self, *args, **options)
            most[id(self)] = max(most.get(id(self), 0), self.nbytes)
            return result

        return counted

    for kind, name in product((DenseCache, RaggedCache), ("append", "keep", "commit")):
        monkeypatch.setattr(kind, name, counting(getattr(kind, name)))
    return most


@pytest.mark.parametrize("budget", [64, 0.15])
@pytest.mark.parametrize("name", ["snapkv", "knorm", "expected_attention", "pyramidkv"])
def test_memory_stays_at_the_budget_and_a_chunk(llama, name, budget, most_bytes):
    """Bytes of all keys ever held at once, in slots: the budget, and what one chunk needs."""
    chunk, new = 32, 40
    params = ContextParams(kv_policy=name, kv_budget=budget, kv_every=1, n_batch=chunk)
    with saccade.Context(llama, params, reserve=500, check="off") as ctx:
        most_bytes.clear()  # of caches in which the model was asked how it rotates keys
        assert len(list(ctx.stream(PROMPT, n_predict=new))) == new
        kept = budget if isinstance(budget, int) else round(budget * ctx.seen)
        layers, slot = len(ctx.cache.stores), 2 * 2 * 16 * 4
        assert 0 < sum(most_bytes.values()) <= layers * slot * (kept + chunk + 64)
        held = [store.num_slots for store in ctx.cache.stores]
        assert sum(held) <= layers * (kept + 1) and ctx.seen == 400 + new


def test_a_text_that_is_shorter_than_a_batch_leaves_no_room_for_one(llama):
    """Slots of 4 layers, 2 heads, 16 float32 numbers of K and V each: the budget and kv_every."""
    params = ContextParams(kv_policy="snapkv", kv_budget=8, kv_every=16, n_batch=512)
    with saccade.Context(llama, params, check="off") as ctx:
        ctx.append(PROMPT[:100])
        assert ctx.cache_bytes == 4 * 2 * (2 * 16 * 4) * (8 + 16)


@pytest.mark.parametrize("every", [1, 50])
def test_heads_with_budgets_of_their_own_hold_them_too(llama, every, most_bytes):
    params = ContextParams(kv_policy="ada_snapkv", kv_budget=64, kv_every=every, n_batch=32)
    with saccade.Context(llama, params, check="off") as ctx:
        assert len(list(ctx.stream(PROMPT, n_predict=60))) == 60
        for store in ctx.cache.stores:
            assert int(store.kv_lens.sum()) <= 2 * (64 + every)
        # Pages are filled by half on average; a store grows by a sixteenth.
        slots = (64 + every + 32 + 32) * 1.1
        assert max(most_bytes.values()) <= 2 * slots * (2 * 16 * 4 + 4) + 400 * 4


@pytest.mark.parametrize("name", POLICIES)
def test_keeping_all_is_bit_for_bit_dense(llama, name):
    """A policy that has nothing to remove changes no logit, whatever it observes."""
    found = []
    for options in ({}, {"kv_policy": name, "kv_budget": 1.0}):
        with saccade.Context(llama, ContextParams(n_batch=64, **options), check="off") as ctx:
            ctx.append(PROMPT[:150])
            ctx.compress()
            found.append(torch.cat([ctx.logits(ctx.append([t])) for t in (5, 9, 17)]))
    if POLICIES[name]().floor is None:
        assert torch.equal(*found)
    else:  # the same keys; a ragged cache has other tiles from its first removal on
        assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_steps_of_the_kernels_are_those_of_the_model(llama, name):
    """Over compressed caches too the C++ layers give the model's own tokens and stored keys."""
    tokens, stored = [], []
    for fused in (None, False):
        params = ContextParams(kv_policy=name, kv_budget=40, fused_layers=fused)
        with saccade.Context(llama, params, check="off") as ctx:
            tokens.append([t.token for t in ctx.stream(PROMPT[:200], n_predict=50)])
            stored.append([store.state() for store in ctx.cache.stores])
    assert tokens[0] == tokens[1]
    for ours, theirs in zip(*stored, strict=True):
        assert ours.progress["seen"] == theirs.progress["seen"]
        for key, x in ours.tensors.items():
            assert torch.allclose(x.float(), theirs.tensors[key].float(), atol=1e-5)


@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize("every", [None, 20])
def test_what_is_compressed_is_quantized_behind_it(llama, stored, every):
    """Near the compressed cache in full precision, in a fraction of its bytes."""
    found, sizes = [], []
    plain = {"kv_policy": "snapkv", "kv_budget": 128, "kv_every": every, "n_batch": 64}
    for options in ({}, {"type_k": stored, "type_v": stored}):
        with saccade.Context(llama, ContextParams(**plain, **options), check="off") as ctx:
            ctx.append(PROMPT)
            ctx.compress()
            found.append(torch.cat([ctx.logits(ctx.append([t])) for t in (5, 9, 17)]))
            sizes.append(ctx.cache_bytes)
            assert ctx.cache.stores[0].num_slots in range(128, 152)
    size = found[0].std()
    near = {"int8": 0.02, "int4": 0.25}[stored]
    assert (found[1] - found[0]).square().mean().sqrt() < near * size or every is not None
    assert sizes[1] < sizes[0] * {"int8": 0.5, "int4": 0.4}[stored]  # few keys: 24 are in 16 bits
