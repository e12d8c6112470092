"""MHA, GQA and MQA from one model."""

from __future__ import annotations

import pytest
import torch

from saccade.core import Unsupported
from saccade.hf import HFModel, attach, converted_heads
from saccade.runtime.params import ContextParams
from tests.hf.model_state import different, state_of
from tests.tiny_models import tiny_config, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_mha_gives_the_same_output_from_a_larger_cache(ids, family):
    model = tiny_model(tiny_config(family))
    plain, kept, sizes = model(ids).logits, state_of(model), []
    for heads in (None, 4):
        with attach(model) as attached:
            if heads is None:
                cache = attached.new_cache()
                model(ids, past_key_values=cache)
            else:
                with converted_heads(model, heads):
                    cache = attached.new_cache()
                    output = model(ids, past_key_values=cache).logits
                    assert HFModel(model).facts.num_kv_heads == 4
            sizes.append(cache.nbytes)
    torch.testing.assert_close(output, plain, atol=1e-5, rtol=1e-5)
    assert sizes[1] == 2 * sizes[0]
    assert different(kept, state_of(model)) == []
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_mqa_is_the_mean_of_the_heads(ids, family):
    model = tiny_model(tiny_config(family))
    plain, kept = model(ids).logits, state_of(model)
    keys = key_rows(model.model.layers[1].self_attn)
    with converted_heads(model, 1):
        pooled = key_rows(model.model.layers[1].self_attn)
        torch.testing.assert_close(pooled, keys.unflatten(0, (2, 16)).mean(0))
        output = model(ids).logits
        with attach(model) as attached:
            cache = attached.new_cache()
            ours = model(ids, past_key_values=cache).logits
            assert cache.nbytes == 2 * pooled_bytes(cache)
    torch.testing.assert_close(ours, output, atol=1e-5, rtol=1e-5)
    assert output.isfinite().all() and not torch.allclose(output, plain, atol=1e-3)
    assert different(kept, state_of(model)) == []


def key_rows(module) -> torch.Tensor:
    """The part of a layer's weights that makes its keys, one row for each dimension."""
    if hasattr(module, "qkv_proj"):
        rows = module.qkv_proj.weight[4 * 16 :]
        return rows[: len(rows) // 2]
    return module.k_proj.weight


def pooled_bytes(cache) -> int:
    """Bytes of the keys of a cache with one head."""
    return sum(store._k[:, :1].nbytes for store in cache.stores)


@torch.no_grad()
def test_equal_heads_pool_without_loss(ids):
    """Where all KV heads agree, MQA loses nothing: conversion and grouping are right."""
    model = tiny_model(tiny_config("llama"))
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight[16:] = weight[:16]
    plain = model(ids).logits
    with converted_heads(model, 1), attach(model, ContextParams(backend="tiled")):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)


def test_restored_after_an_exception(llama):
    kept = state_of(llama)
    with pytest.raises(KeyError), converted_heads(llama, 4):
        raise KeyError
    assert different(kept, state_of(llama)) == []


def test_other_projections_are_refused():
    model = tiny_model(tiny_config("deepseek_v3"))
    kept = state_of(model)
    with pytest.raises(Unsupported, match="needs a linear q_proj in every attention layer"):
        converted_heads(model, 1).__enter__()
    assert different(kept, state_of(model)) == []


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", "aligned"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_models_own_number_of_heads_changes_nothing(ids, family, method):
    model = tiny_model(tiny_config(family))
    plain = model(ids).logits
    with converted_heads(model, 2, method=method, calibration=ids) as done:
        assert torch.equal(model(ids).logits, plain)
    assert done.before == done.after == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_kv_heads": 3}, ValueError, "4 query heads and 2 KV heads can have 1, 2, 4 KV heads"),
        ({"num_kv_heads": 0}, ValueError, "got 0. Choose one of these"),
        ({"num_kv_heads": 8}, ValueError, "got 8"),
        ({"num_kv_heads": True}, TypeError, "whole number, got bool True"),
        ({"num_kv_heads": 1.0}, TypeError, "whole number, got float 1.0"),
        ({"num_kv_heads": 1, "method": "svd"}, ValueError, "method is one of mean, aligned"),
        ({"num_kv_heads": 1, "method": "aligned"}, ValueError, "needs calibration="),
    ],
)
def test_wrong_requests_are_one_sentence_and_change_nothing(llama, options, error, said):
    kept = state_of(llama)
    with pytest.raises(error, match=said):
        converted_heads(llama, **options).__enter__()
    assert different(kept, state_of(llama)) == []


def test_models_that_cannot_share_heads_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(Unsupported, match="no field num_key_value_heads"):
        converted_heads(model, 1).__enter__()
