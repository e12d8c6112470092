"""Our caches as `past_key_values`: equal to transformers' own where they are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from saccade.cache import DenseCache, QuantizedCache, RingCache, make_layer_cache
from saccade.core import Unsupported
from saccade.hf import KEY, Context, HFModel, SaccadeCache, attach
from saccade.hf.layers import layer_windows
from saccade.ops import attend
from saccade.runtime.params import ContextParams
from tests.tiny_models import WINDOW, tiny_config, tiny_model

CHUNKS = ((0, 6), (6, 14), (14, 15), (15, 24))


def exact_cache(model) -> SaccadeCache:
    return SaccadeCache(model.config, lambda index, window: make_layer_cache(window=window))


@torch.no_grad()
def in_chunks(model, ids: Tensor, mask: Tensor | None, cache) -> Tensor:
    return torch.cat(
        [
            model(
                ids[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                past_key_values=cache,
            ).logits
            for start, stop in CHUNKS
        ],
        1,
    )


@pytest.mark.parametrize("padding", [False, True])
def test_chunks_equal_eager(cache_pair, ids, padded, padding):
    mask = padded if padding else None
    theirs = in_chunks(cache_pair.eager, ids, mask, DynamicCache(config=cache_pair.eager.config))
    cache = exact_cache(cache_pair.ours)
    ours = in_chunks(cache_pair.ours, ids, mask, cache)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == cache.seen == 24


def test_sliding_layers_get_rings_of_the_models_window(cache_pair):
    cache = exact_cache(cache_pair.ours)
    sliding = ["sliding" in t for t in layer_types(cache_pair.ours.config)]
    assert cache.is_sliding == sliding
    kinds = [RingCache if s else DenseCache for s in sliding]
    assert [type(store) for store in cache.stores] == kinds
    assert {layer.window for layer in cache.layers} <= {None, WINDOW}


def layer_types(config) -> list[str]:
    types = getattr(config, "layer_types", None)
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return types or [window] * config.num_hidden_layers


def test_ring_memory_stands_still(ids):
    model = tiny_model(tiny_config("mistral"), KEY)
    cache = exact_cache(model)
    in_chunks(model, ids, None, cache)
    before = cache.nbytes
    in_chunks(model, ids, None, cache)
    # keys and values, layers, rows, KV heads, slots, head_dim, bytes of a float32
    assert cache.nbytes == before == 2 * 4 * 2 * 2 * WINDOW * 16 * 4


@pytest.mark.parametrize("how", ["greedy", "beams", "sampling", "chunked"])
def test_generate(cache_pair, ids, padded, how):
    options = {
        "greedy": {"do_sample": False},
        "beams": {"do_sample": False, "num_beams": 3},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "chunked": {"do_sample": False, "prefill_chunk_size": 7},
    }[how]
    texts = []
    for model, cache in (
        (cache_pair.ours, exact_cache(cache_pair.ours)),
        (cache_pair.eager, None),
    ):
        torch.manual_seed(0)
        texts.append(
            model.generate(
                ids, attention_mask=padded, max_new_tokens=4, past_key_values=cache, **options
            )
        )
    assert torch.equal(*texts)


def test_reset_and_reuse(cache_pair, ids):
    cache = exact_cache(cache_pair.ours)
    first = in_chunks(cache_pair.ours, ids, None, cache)
    cache.reset()
    assert cache.seen == 0
    assert torch.equal(in_chunks(cache_pair.ours, ids, None, cache), first)


@torch.no_grad()
def test_rows_and_rollback(ids):
    model = tiny_model(tiny_config("llama"), KEY)
    cache = exact_cache(model)
    model(ids, past_key_values=cache)
    cache.crop(-4)
    assert cache.seen == 20
    again = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 20:], atol=1e-5, rtol=1e-5)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.batch_select_indices(torch.tensor([False, True]))
    last = model(ids[1:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(last, again[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="as a negative number, got 3"):
        cache.crop(3)


def test_assisted_generation(ids):
    model, assistant = (tiny_model(tiny_config("llama"), KEY, seed) for seed in (0, 1))
    plain = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assisted = model.generate(
        ids[:1],
        max_new_tokens=8,
        do_sample=False,
        assistant_model=assistant,
        past_key_values=exact_cache(model),
    )
    assert torch.equal(plain, assisted)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_functions_get_tensors_of_all_keys(ids, implementation):
    model = tiny_model(tiny_config("llama"), implementation)
    plain = model(ids).logits
    for params in (ContextParams(), ContextParams(type_k="bf16", type_v="bf16")):
        cache = exact_cache(model) if params == ContextParams() else bf16_cache(model)
        read = [model(part, past_key_values=cache).logits for part in ids.split(9, dim=1)]
        tolerance = 1e-5 if params == ContextParams() else 0.5
        torch.testing.assert_close(torch.cat(read, 1), plain, atol=tolerance, rtol=tolerance)


def bf16_cache(model):
    return SaccadeCache(model.config, lambda layer, window: DenseCache(dtype=torch.bfloat16))


@torch.no_grad()
def test_other_attention_functions_get_no_keys_of_rings(ids):
    model = tiny_model(tiny_config("gpt_oss"), "eager")
    cache = exact_cache(model)
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(Unsupported, match="a cache that drops tokens .* has no effect here"):
        for part in ids.split(4, dim=1):
            model(part, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_latent_attention_reads_what_it_cached(ids, kind):
    """DeepSeek caches latents and expands them to heads itself, so it gets tensors back."""
    model = tiny_model(tiny_config("deepseek_v3"), KEY)
    plain = model(ids).logits
    stores = {"dense": DenseCache, "int8": lambda: QuantizedCache(group=4, recent=4)}[kind]
    cache = SaccadeCache(model.config, lambda layer, window: stores())
    ours = torch.cat([model(x, past_key_values=cache).logits for x in ids.split(5, dim=1)], 1)
    assert cache.rebuilt and cache.stores[0].seen == 24
    error = (ours - plain).abs().mean() / plain.std()
    assert error < (1e-5 if kind == "dense" else 0.3)


@torch.no_grad()
def test_options_that_latent_attention_would_ignore_are_refused(ids):
    model = tiny_model(tiny_config("deepseek_v3"))
    tokens = ids[0].tolist()
    options = {"n_swa": 8}, {"kv_policy": "snapkv", "kv_budget": 8}
    for option in options:
        with (
            Context(model, ContextParams(**option)) as ctx,
            pytest.raises(Unsupported, match="no effect here"),
        ):
            ctx.append(tokens)
    with Context(model) as ctx, pytest.raises(Unsupported, match="caches what it computes keys"):
        ctx.append(tokens)
        ctx.shift(2)


def test_layers_that_select_keys_are_refused():
    config = tiny_config("llama")
    config.layer_types = ["full_attention", "compressed_sparse_attention"] * 2
    with pytest.raises(Unsupported, match="layer 1 of llama is 'compressed_sparse_attention'"):
        SaccadeCache(config, lambda index, window: make_layer_cache(window=window))


@torch.no_grad()
def test_observer_sees_every_call(ids):
    model = tiny_model(tiny_config("gemma3"), KEY)
    cache, calls = exact_cache(model), []

    def observe(layer, call, backend):
        result = attend(call, backend=backend)
        calls.append((layer, call, result.lse))
        return result

    cache.observer = observe
    model(ids, past_key_values=cache)
    cache.observer = None
    model(ids[:, :1], past_key_values=cache)
    assert [call[0] for call in calls] == [0, 1, 2, 3]
    _, call, lse = calls[-1]
    assert call.q.shape == (2, 4, 24, 16) and call.kv.shape == (2, 2, 24, 16, 16)
    assert call.scale == 0.25 and lse.shape == (2, 4, 24) and lse.isfinite().all()
    windows = [call.mask.window for _, call, _ in calls]
    assert windows == list(layer_windows(model.config)) and len(set(windows)) == 2


@torch.no_grad()
def test_compressed_cache_goes_on(ids):
    """After `keep` the cache holds fewer keys than tokens; attention runs over what is left."""
    model = tiny_model(tiny_config("llama"), KEY)
    cache = exact_cache(model)
    model(ids, past_key_values=cache)
    for store in cache.stores:
        store.keep(torch.arange(12, 24).expand(2, 2, -1))
    assert cache.seen == 24
    assert model(ids[:, :3], past_key_values=cache).logits.isfinite().all()
    assert cache.seen == 27 and cache.stores[0].num_slots == 15
    mask = torch.ones(2, 28, dtype=torch.int64)
    mask[0, :2] = 0
    with pytest.raises(Unsupported, match=r"compressed cache \(16 keys kept of 28 tokens\)"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantized_cache_stays_close(ids, bits):
    model = tiny_model(tiny_config("llama"), KEY)
    long = ids.repeat(1, 16)
    exact = model(long).logits
    with attach(model, ContextParams(type_k=bits, type_v=bits)) as attached:
        cache = attached.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in long.split(64, dim=1)]
    error = (torch.cat(parts, 1) - exact).norm() / exact.norm()
    assert 0 < error < {"int8": 0.02, "int4": 0.4}[bits]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_runtime_adapter(ids, family):
    model = tiny_model(tiny_config(family), KEY)
    adapter, params = HFModel(model, "tiny"), ContextParams()
    cache = adapter.new_cache(params)
    hidden = adapter.hidden(ids, cache)
    torch.testing.assert_close(adapter.logits(hidden), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert cache.seen == 24 and len(cache.layers) == 4 and cache.nbytes > 0
    facts = adapter.facts
    assert (facts.num_heads, facts.num_kv_heads, facts.head_dim) == (4, 2, 16)
    assert facts.n_ctx_train == 512 and facts.vocab_size == 128 and facts.name == "tiny"
    assert (
        facts.windows
        == {
            "llama": (None,) * 4,
            "gpt_oss": (WINDOW, None) * 2,
            "gemma2": (WINDOW, None) * 2,
        }[family]
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt_oss"])
def test_context_shift_is_exact_in_the_first_layer(ids, family):
    """Moving cached keys down gives the keys of the moved tokens."""
    model = tiny_model(tiny_config(family), KEY)
    adapter = HFModel(model)
    shift = adapter.shift_keys(0)
    keys = []
    for tokens in (ids, ids[:, 6:]):
        cache = SaccadeCache(model.config, lambda index, window: DenseCache())
        model(tokens, past_key_values=cache)
        keys.append(cache.stores[0].view().k)
    torch.testing.assert_close(shift(keys[0][:, :, 6:], -6), keys[1], atol=1e-5, rtol=1e-5)


def test_a_window_wider_than_memory_takes_what_the_text_takes(ids):
    config = tiny_config("mistral", sliding_window=10**9)
    model = tiny_model(config, "eager")
    with torch.no_grad():
        expected = model(ids[:1]).logits[0]
    with Context(model) as ctx:
        found = ctx.logits(ctx.append(ids[0], wanted=ids.shape[1]))
        assert ctx.cache_bytes < 1 << 20
    assert torch.allclose(found, expected, atol=1e-5)
