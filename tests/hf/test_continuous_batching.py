"""transformers' continuous batching with saccade's attention: the tokens of one text at a time."""

from inspect import signature

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from saccade.core import Unsupported
from saccade.hf import continuous_batching
from saccade.hf.continuous import FLASH_KEY, packed_attention
from tests.tiny_models import tiny_config, tiny_model

PROMPTS = [[5, 6, 7], [9, 4, 11] * 9, [3, 1, 4, 1, 5]]
GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
served = pytest.mark.skipif(
    "kwargs" not in signature(PagedAttentionCache.update).parameters,
    reason="the cache of this transformers takes other arguments",
)


def one_by_one(model):
    """The tokens of each text alone."""
    return [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@served
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_the_same_tokens_as_eager_attention_one_text_at_a_time(family):
    model = tiny_model(tiny_config(family))
    expected = one_by_one(model)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, use_cuda_graph=False)
    with continuous_batching(model) as same:
        assert same is model and model.config._attn_implementation == FLASH_KEY
        done = model.generate_batch(
            PROMPTS, generation_config=GREEDY, continuous_batching_config=small
        )
        assert one_by_one(model) == expected  # other calls of the model too
    assert [each.generated_tokens for each in done.values()] == expected
    assert model.config._attn_implementation == "eager"


@served
def test_padding_of_other_calls_inside_is_seen():
    model = tiny_model(tiny_config("llama"))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 1, 4, 1, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    with continuous_batching(model):
        found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-4)


@served
def test_the_config_is_put_back_after_an_exception():
    model = tiny_model(tiny_config("llama"))
    with pytest.raises(KeyError), continuous_batching(model):
        raise KeyError
    assert model.config._attn_implementation == "eager"


@served
def test_arguments_of_unknown_meaning_are_refused():
    model = tiny_model(tiny_config("llama"))
    module, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 16)
    for name in ("block_table", "indices"):
        with pytest.raises(Unsupported, match="saccade attention cannot run LlamaAttention"):
            packed_attention(module, x, x, x, cache=object(), **{name: torch.zeros(1)})


def test_a_cache_of_other_arguments_is_refused(monkeypatch):
    monkeypatch.setattr(PagedAttentionCache, "update", lambda self, key_states, read_index: None)
    with pytest.raises(Unsupported, match="continuous batching of transformers 5.23"):
        with continuous_batching(tiny_model(tiny_config("llama"))):
            raise AssertionError("entered")
