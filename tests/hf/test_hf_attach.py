"""`attach`: what the params do to a model, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from saccade.cache import QuantizedCache, RingCache
from saccade.core import Unsupported
from saccade.hf import KEY, attach
from saccade.hf.cache import SaccadeCache
from saccade.runtime.params import ContextParams
from saccade.sparse import BlockTopK, Strided
from tests.hf.model_state import different, state_of
from tests.tiny_models import WINDOW, tiny_config, tiny_model

YARN = ContextParams(n_ctx=2048, rope_scaling_type="yarn")


@pytest.mark.parametrize(
    "params",
    [
        ContextParams(),
        YARN,
        ContextParams(n_swa=4, n_sinks=2),
        ContextParams(type_k="int8", type_v="int8", sparse=Strided(block=4)),
    ],
    ids=["default", "yarn", "window", "int8"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_restores_exactly(llama, ids, params, fails):
    with torch.no_grad():
        before = llama(ids).logits
    kept = state_of(llama)
    try:
        with attach(llama, params) as attached, torch.no_grad():
            assert llama.config._attn_implementation == KEY
            llama(ids, past_key_values=attached.new_cache())
            if fails:
                raise KeyError("anything")
    except KeyError:
        assert fails
    assert different(kept, state_of(llama)) == []
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, before)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "phi3"])
def test_restores_other_families(ids, family):
    model = tiny_model(tiny_config(family))
    kept = state_of(model)
    with attach(model, YARN):
        model(ids)
    assert different(kept, state_of(model)) == []


DRAFTED = {"n_draft": 4, "sparse": BlockTopK()}


@pytest.mark.parametrize("option", [{"n_ctx": 32}, {"n_batch": 4}, {"n_keep": 4}, DRAFTED])
def test_what_only_a_context_carries_out_is_refused(llama, option):
    name, *_ = option
    with pytest.raises(Unsupported, match=f"{name}=.* has no effect under attach: .*Context"):
        attach(llama, ContextParams(**option)).__enter__()


def test_a_policy_that_nothing_carries_out_is_refused(llama, ids):
    """A call of the model does not say where the prompt ends; generate() does."""
    params = ContextParams(kv_policy="snapkv", kv_budget=8)
    with attach(llama, params) as attached:
        with pytest.raises(Unsupported, match="kv_policy='snapkv' compresses where a prompt ends"):
            llama(ids, past_key_values=attached.new_cache())
        cache = attached.new_cache()
        llama.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        llama(ids[:, :1], past_key_values=cache)  # goes on behind what was compressed
        assert cache.stores[0].num_slots == 8 + 2


def test_generate_brings_caches_that_can_go_back(ids):
    model = tiny_model(tiny_config("gemma2"))
    with attach(model, ContextParams(ctx_checkpoints=2, fused_layers=False)):
        out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
        with pytest.raises(Unsupported, match="of storage, compression or checkpoints"):
            model.generate(ids, max_new_tokens=2, past_key_values=DynamicCache())
    assert isinstance(out.past_key_values, SaccadeCache)


def test_failing_to_attach_leaves_nothing(llama):
    kept = state_of(llama)
    with pytest.raises(ValueError, match="needs to know how far to stretch"):
        attach(llama, ContextParams(rope_scaling_type="yarn")).__enter__()
    assert different(kept, state_of(llama)) == []


@torch.no_grad()
def test_attached_inside_attached(llama, ids):
    plain = llama(ids).logits
    with attach(llama, ContextParams(n_swa=4)):
        narrow = llama(ids).logits
        kept = state_of(llama)
        with attach(llama):
            torch.testing.assert_close(llama(ids).logits, plain, atol=1e-5, rtol=1e-5)
            inner = llama.generate(ids, max_new_tokens=4, do_sample=False)
        assert different(kept, state_of(llama)) == []
        assert torch.equal(llama(ids).logits, narrow)
    assert torch.equal(inner, llama.generate(ids, max_new_tokens=4, do_sample=False))
    assert not torch.allclose(narrow, plain, atol=1e-3)


def seen_within(window, sinks):
    """The mask in plain numbers, as eager attention adds it."""
    q, k = torch.arange(24)[:, None], torch.arange(24)
    visible = (k <= q) & ((q - k < window) | (k < sinks))
    return torch.zeros(2, 1, 24, 24).masked_fill(~visible, -1e30)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "mistral"])
def test_window_is_the_masked_model_with_and_without_ring(ids, family, sinks):
    """n_swa narrows what is wider, with sinks in full layers alone; with and without a cache."""
    model = tiny_model(tiny_config(family))
    with attach(model, ContextParams(n_swa=5, n_sinks=sinks)) as attached:
        whole = model(ids).logits
        cache = attached.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
        assert {type(store) for store in cache.stores} == {RingCache}
    masks = {"sliding_attention": seen_within(5, 0), "full_attention": seen_within(5, sinks)}
    one_for_all = {"llama": "full_attention", "mistral": "sliding_attention"}
    mask = masks[one_for_all[family]] if family in one_for_all else masks
    reference = tiny_model(tiny_config(family))(ids, attention_mask=mask)
    torch.testing.assert_close(whole, reference.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_wider_window_leaves_the_models_own(ids):
    model = tiny_model(tiny_config("mistral"))
    plain = model(ids).logits
    with attach(model, ContextParams(n_swa=WINDOW + 8, n_sinks=1)) as attached:
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        assert attached.new_cache().layers[0].store._window == WINDOW


def test_generate_brings_the_cache_that_params_need(llama, ids):
    with attach(llama, ContextParams(n_swa=5, n_sinks=1)) as attached:
        own = llama.generate(ids, max_new_tokens=4, do_sample=False)
        given = llama.generate(
            ids, max_new_tokens=4, do_sample=False, past_key_values=attached.new_cache()
        )
        output = llama.generate(
            ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
    assert torch.equal(own, given)
    assert isinstance(output.past_key_values.stores[0], RingCache)
    with attach(llama, ContextParams(type_k="int8", type_v="int8")):
        output = llama.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(output.past_key_values.stores[0], QuantizedCache)


def test_conflicting_generate_options(llama, ids):
    with attach(llama, ContextParams(n_swa=5)):
        with pytest.raises(Unsupported, match="use_cache=False conflicts with the cache"):
            llama.generate(ids, max_new_tokens=2, use_cache=False)
        with pytest.raises(Unsupported, match="cache_implementation='static' conflicts"):
            config = GenerationConfig(cache_implementation="static", max_new_tokens=2)
            llama.generate(ids, generation_config=config)


@torch.no_grad()
def test_quantized_params_refuse_a_cache_of_transformers(llama, ids):
    with attach(llama, ContextParams(type_k="int8", type_v="int8")):
        output = llama(ids)
        with pytest.raises(Unsupported, match=r"past_key_values=attached\.new_cache"):
            llama(ids[:, :1], past_key_values=output.past_key_values)


@torch.no_grad()
def test_sinks_and_left_padding_do_not_go_together(llama, ids, padded):
    with (
        attach(llama, ContextParams(n_swa=5, n_sinks=2)),
        pytest.raises(Unsupported, match="the attention mask hides them"),
    ):
        llama(ids, attention_mask=padded)


@torch.no_grad()
def test_masks_that_hide_the_sinks_are_refused(llama, ids, padded):
    """Padding on the left as a 4-D mask, as a graph gets it, and two sequences in a row."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    sequence = torch.arange(length) // (length // 2)
    masks = {
        "left": padded,
        "left, 4-D": (causal & padded[:, None, None].bool()),
        "packed": (causal & (sequence[:, None] == sequence))[None, None],
    }
    with attach(llama, ContextParams(n_swa=5, n_sinks=2)):
        for name, mask in masks.items():
            with pytest.raises(Unsupported, match="the attention mask hides them"):
                llama(ids, attention_mask=mask)
                pytest.fail(f"{name} went through")
        llama(ids, attention_mask=padded.flip(1))


@torch.no_grad()
def test_guessing_ahead_needs_a_cache_that_can_go_back(llama, ids):
    window, whole = ContextParams(n_swa=5), ContextParams(type_k="int8", type_v="int8")
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": llama}):
        refused = pytest.raises(Unsupported, match="guesses tokens and takes wrong ones back")
        with attach(llama, window), refused:
            llama.generate(ids[:1], max_new_tokens=2, **options)
    with attach(llama, whole):
        plain = llama.generate(ids[:1], max_new_tokens=20, do_sample=False)
        ahead = llama.generate(
            ids[:1], max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=2
        )
    assert torch.equal(plain, ahead)


@torch.no_grad()
def test_flash_attn_disabled_is_the_reference(llama, ids):
    from saccade.hf.layers import attention_modules
    from saccade.hf.settings import settings_of

    for option, backend in (("disabled", "reference"), ("enabled", "auto"), ("auto", "auto")):
        with attach(llama, ContextParams(flash_attn=option)):
            used = {settings_of(module).backend for _, module in attention_modules(llama)}
            assert used == {backend}


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Strided(block=4, window_blocks=6), BlockTopK(block=4, top=6)])
def test_sparse_patterns_that_read_everything_change_nothing(llama, ids, pattern):
    plain = llama(ids).logits
    with attach(llama, ContextParams(sparse=pattern)) as attached:
        torch.testing.assert_close(llama(ids).logits, plain, atol=1e-5, rtol=1e-5)
        cache = attached.new_cache()
        parts = [llama(part, past_key_values=cache).logits for part in ids.split(8, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-5, rtol=1e-5)
    with attach(llama, ContextParams(sparse=Strided(block=2, window_blocks=1, stride=0))):
        assert not torch.allclose(llama(ids).logits, plain, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_sparse_patterns_leave_sliding_layers_alone(ids, family):
    model = tiny_model(tiny_config(family))
    plain = model(ids).logits
    with attach(model, ContextParams(sparse=BlockTopK(block=4, top=6))) as attached:
        cache = attached.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(8, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-5, rtol=1e-5)


def test_models_off_the_attention_interface_are_refused(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "_can_set_attn_implementation", classmethod(lambda cls: False))
    kept = state_of(llama)
    with pytest.raises(Unsupported, match="does not call transformers' attention interface"):
        attach(llama).__enter__()
    assert different(kept, state_of(llama)) == []
