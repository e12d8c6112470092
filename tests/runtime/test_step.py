"""DecodeStep: one token at positions given by tensors equals Context.append."""

from dataclasses import replace

import pytest
import torch

import saccade
from saccade.core import Unsupported
from saccade.ops.kv_write import append as appending
from saccade.runtime import ContextParams, DecodeStep
from saccade.sparse import BlockTopK, BlockTopP, FromLength, Quest, Strided
from tests.tiny_models import tiny_config, tiny_model

PROMPT = torch.arange(3, 153) % 120 + 3
CACHES = {
    "dense": ContextParams(n_batch=64),
    "int8": ContextParams(n_batch=64, type_k="int8", type_v="int8"),
    "int4": ContextParams(n_batch=64, type_k="int4", type_v="int4"),
    "ring": ContextParams(n_batch=64, n_swa=40),
    "ring with sinks": ContextParams(n_batch=16, n_swa=25, n_sinks=3),
    "compressed": ContextParams(kv_policy="snapkv", kv_budget=40),
    "block top-k": ContextParams(sparse=BlockTopK(block=8, top=3, window_blocks=1)),
    "quest": ContextParams(sparse=Quest(block=8, top=3)),
    "block top-p beyond 200 keys": ContextParams(
        sparse=FromLength(pattern=BlockTopP(block=8, p=0.3, window_blocks=1), least=200)
    ),
    "strided": ContextParams(sparse=Strided(block=8)),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return tiny_model(tiny_config(request.param))


def eager(model, params, tokens):
    with saccade.Context(model, params) as ctx:
        ctx.append(PROMPT)
        ctx.compress()
        ctx.cache.observer = None
        return torch.cat([ctx.logits(ctx.append([token])) for token in tokens])


def stepped(model, params, tokens):
    with saccade.Context(model, params) as ctx:
        ctx.append(PROMPT)
        ctx.compress()
        ctx.cache.observer = None
        step = DecodeStep(ctx.model, ctx.cache)
        return torch.cat([step(token) for token in tokens])


@pytest.mark.parametrize("name", CACHES)
def test_equals_append(model, name):
    """Long enough for dense storage to grow and for groups of tokens to be quantized."""
    tokens = [(7 * i) % 120 + 3 for i in range(150)]
    expected = eager(model, CACHES[name], tokens)
    fused = replace(CACHES[name], fused_layers=True)
    # A step rounds new keys of a quantized cache to 16 bits before RoPE or behind it.
    near = {"int8": 3e-4, "int4": 3e-3}.get(name, 2e-5)
    assert torch.allclose(stepped(model, fused, tokens), expected, atol=near)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_storage_in_the_models_own_dtype_is_stepped_like_none(dtype, stored):
    """It is the same cache, so a GPU captures its steps, and `attach` needs no cache of ours."""
    own = tiny_model(tiny_config("llama")).to(getattr(torch, dtype))
    params = ContextParams(type_k=stored, type_v=stored)
    with saccade.Context(own, params) as ctx, saccade.Context(own) as plain:
        assert ctx.params == plain.params
        for each in (ctx, plain):
            each.append(PROMPT)
        assert ctx.cache_bytes == plain.cache_bytes
    with saccade.attach(own, params) as attached:
        assert attached.model.generate(PROMPT[None], max_new_tokens=2).shape[1] == len(PROMPT) + 2
    other = ContextParams(type_k="f16", type_v="f16")
    with saccade.Context(own, other) as ctx:
        assert ctx.params == other


def test_a_batch(model):
    with saccade.attach(model) as attached:
        hf = saccade.hf.HFModel(attached.model)
        rows = torch.stack((PROMPT[:30], PROMPT[50:80]))
        logits = []
        for how in ("append", "step"):
            cache = hf.new_cache(ContextParams())
            with torch.inference_mode():
                hf.hidden(rows, cache)
                if how == "append":
                    logits.append(hf.logits(hf.hidden(torch.tensor([[5], [9]]), cache)[:, -1]))
                else:
                    logits.append(DecodeStep(hf, cache, batch=2)(torch.tensor([5, 9])))
        assert torch.allclose(*logits, atol=2e-5)


@pytest.mark.parametrize("params", [ContextParams(), ContextParams(n_swa=9, n_sinks=2)], ids=str)
def test_other_uses_in_between(model, params):
    """A step notices that the cache was appended to, shifted, or cut back."""
    logits = []
    for how in ("append", "step"):
        with saccade.Context(model, params) as ctx:
            ctx.append(PROMPT[:20])
            step = DecodeStep(ctx.model, ctx.cache)
            read = step if how == "step" else lambda t, ctx=ctx: ctx.logits(ctx.append([t]))
            read(5)
            ctx.append(PROMPT[20:40])
            read(6)
            ctx.shift(4)
            read(7)
            logits.append(read(8).clone())
    assert torch.allclose(*logits, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_the_cache_applies_deferred_rope(model, monkeypatch, fused):
    """Only with fused layers."""
    ropes = []
    original = appending.append

    def watched(slots, k, v, rope=None):
        ropes.append(rope)
        return original(slots, k, v, rope)

    monkeypatch.setattr("saccade.cache.dense.append", watched)
    stepped(model, ContextParams(fused_layers=fused), [5])
    assert [rope is not None for rope in ropes] == [fused] * 4


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "gpt_oss"])
def test_deferred_rope_suits_other_models(family, window):
    """Rings, hybrids and dense caches of any family are stepped, RoPE deferred or not."""
    config = tiny_config(family)
    if not window and getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    elif not window:
        config.sliding_window = None
    model, tokens = tiny_model(config), [5, 6, *range(10, 50)]
    expected = eager(model, ContextParams(), tokens)
    found = stepped(model, ContextParams(fused_layers=True), tokens)
    assert torch.allclose(found, expected, atol=2e-5)


def test_refusals(model):
    with saccade.Context(model, ContextParams(page_size=16)) as ctx:
        ctx.append(PROMPT)
        with pytest.raises(Unsupported, match="layer 0 has a PagedCache"):
            DecodeStep(ctx.model, ctx.cache)
    with saccade.Context(model) as ctx, pytest.raises(Unsupported, match="the cache is empty"):
        DecodeStep(ctx.model, ctx.cache)


@pytest.mark.parametrize("able", [True, False])
def test_streams_take_steps_where_they_can(model, monkeypatch, able):
    """As on a GPU; a model that cannot be captured goes on by append, nothing read twice."""
    prompt, steps = PROMPT[:20], []
    expected = model.generate(prompt[None], max_new_tokens=9, do_sample=False)[0, 20:]
    original = DecodeStep.__call__

    def call(self, token):
        steps.append(token)
        if not able:
            self._layers[0].reserve(1)
            raise Unsupported("no")
        return original(self, token)

    with saccade.Context(model) as ctx:  # which may check the model, by steps of its own
        monkeypatch.setattr(DecodeStep, "__call__", call)
        monkeypatch.setattr(saccade.runtime.Context, "_can_step", lambda self: True)
        tokens = [each.token for each in ctx.stream(prompt, n_predict=9)]
        assert ctx.tokens == [*prompt.tolist(), *tokens] and ctx.seen == 29
    assert tokens == expected.tolist()
    assert len(steps) == (9 if able else 1)
