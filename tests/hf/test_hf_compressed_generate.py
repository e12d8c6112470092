"""generate() under a kv_policy: the tokens and keys that a Context keeps, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

import saccade
from saccade.cache import DenseCache, RaggedCache
from saccade.compress import POLICIES
from saccade.core import Unsupported
from saccade.runtime import ContextParams
from tests.tiny_models import tiny_config, tiny_model

PROMPT = (torch.arange(3, 83) * 7 % 120 + 3)[None]
NEW = 12


def generated(model, params, prompt=PROMPT, **options):
    with saccade.attach(model, params) as attached:
        cache = attached.new_cache()
        options |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        out = model.generate(prompt, past_key_values=cache, **options)
    return out[:, prompt.shape[1] :], cache


def removed(store):
    """How many keys of each head are gone."""
    if isinstance(store, RaggedCache):
        return (store.seen - store.kv_lens).tolist()
    return store.seen - store.num_slots if isinstance(store, DenseCache) else 0


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("fused", [None, False])
def test_tokens_and_kept_keys_are_those_of_a_context(family, policy, fused):
    model = tiny_model(tiny_config(family))
    params = ContextParams(kv_policy=policy, kv_budget=24, fused_layers=fused)
    tokens, cache = generated(model, params)
    with saccade.Context(model, params, check="off") as ctx:
        expected = ctx.stream(PROMPT[0], n_predict=NEW)
        assert tokens[0].tolist() == [each.token for each in expected]
        for ours, theirs in zip(cache.stores, ctx.cache.stores, strict=True):
            assert removed(ours) == removed(theirs)
    assert cache.seen == PROMPT.shape[1] + NEW - 1


def test_a_prompt_read_in_chunks_is_compressed_at_its_end():
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(kv_policy="snapkv", kv_budget=24)
    whole, _ = generated(model, params)
    chunks, cache = generated(model, params, prefill_chunk_size=16)
    assert torch.equal(whole, chunks)
    assert cache.stores[0].num_slots == 24 + NEW - 1


def test_rows_of_a_batch_keep_their_own_keys():
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(kv_policy="snapkv", kv_budget=24)
    rows = torch.cat((PROMPT, PROMPT.flip(1)))
    both, _ = generated(model, params, rows)
    for row, found in zip(rows, both, strict=True):
        alone, _ = generated(model, params, row[None])
        assert torch.equal(found, alone[0])


def test_what_hides_the_end_of_the_prompt_is_refused():
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(kv_policy="snapkv", kv_budget=24)
    with saccade.attach(model, params):
        embeds = model.model.embed_tokens(PROMPT)
        with pytest.raises(Unsupported, match="inputs_embeds do not say"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)
        mask = torch.ones_like(PROMPT)
        mask[:, 40:43] = 0
        with pytest.raises(Unsupported, match="padded on the left, but this attention_mask hides"):
            model.generate(PROMPT, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [24, 0.3])
def test_rows_of_a_padded_batch_are_as_alone(policy, budget):
    """Every row keeps its own share, of its own text; padding is kept by none."""
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(kv_policy=policy, kv_budget=budget)
    texts = [PROMPT[0], PROMPT[0, 30:].flip(0), PROMPT[0, 60:]]
    longest = max(map(len, texts))
    padded = torch.stack([F.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([F.pad(torch.ones_like(t), (longest - len(t), 0)) for t in texts])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with saccade.attach(model, params):
        both = model.generate(padded, attention_mask=mask, **options)
        stores = both.past_key_values.stores[: None if POLICIES[policy].across_layers else 1]
        kept = torch.stack([store.kv_lens.float() for store in stores]).mean((0, 2))
        for row, text in enumerate(texts):
            alone = model.generate(text[None], **options)
            found = torch.stack(both.logits)[:, row]
            assert torch.allclose(found, torch.stack(alone.logits)[:, 0], atol=2e-4)
            least = budget if isinstance(budget, int) else round(budget * len(text))
            assert kept[row] == min(least, len(text)) + NEW - 1


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv", "expected_attention"])
@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_of_a_padded_batch_are_those_of_each_text(policy, copies):
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(kv_policy=policy, kv_budget=24)
    short = PROMPT[0, 30:].flip(0)
    before = PROMPT.shape[1] - len(short)
    padded = torch.stack([PROMPT[0], F.pad(short, (before, 0))])
    mask = torch.stack([torch.ones_like(PROMPT[0]), F.pad(torch.ones_like(short), (before, 0))])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **copies}
    with saccade.attach(model, params):
        both = model.generate(padded, attention_mask=mask, **options)[:, PROMPT.shape[1] :]
        alone = [model.generate(x[None], **options)[:, len(x) :] for x in (PROMPT[0], short)]
    assert torch.equal(both, torch.cat(alone))
