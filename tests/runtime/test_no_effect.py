"""Options that change nothing for a model: each is said, and none that changes something."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import GPT2Config

import saccade
from saccade.core import BlockSelection
from saccade.hf.facts import facts_of
from saccade.runtime import ContextParams
from saccade.runtime.no_effect import no_fewer_heads, without_effect
from saccade.sparse import BlockTopK, Strided, TriangleMix, XAttention
from tests.tiny_models import tiny_config, tiny_model

PARAMS = ContextParams


def facts(name):
    config = tiny_config(name)
    return facts_of(config, name=name, n_ctx_train=None, dtype=torch.float32)


def gpt2():
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return facts_of(config, name="gpt2", n_ctx_train=None, dtype=torch.float32)


FULL, SLIDING, MIXED = "llama", "mistral", "gemma3"
COVERING = Strided(block=64, window_blocks=8)
INT8 = {"type_k": "int8", "type_v": "int8"}
SNAPKV = {"kv_policy": "snapkv", "kv_budget": 64}
CASES = [
    (INT8, [SLIDING]),
    ({"type_k": "f32", "type_v": "f32"}, [FULL, SLIDING, MIXED]),
    ({"type_k": "f16", "type_v": "f16"}, []),
    ({"page_size": 16}, [SLIDING]),
    ({"offload_kqv": False}, [SLIDING]),
    (SNAPKV, [SLIDING]),
    ({"kv_policy": "ada_snapkv", "kv_budget": 1.0}, [FULL, SLIDING, MIXED]),
    ({"kv_policy": "snapkv", "kv_budget": 512}, [FULL, SLIDING, MIXED]),
    ({"kv_policy": "snapkv", "kv_budget": 511}, [SLIDING]),
    ({"n_swa": 8}, [SLIDING]),
    ({"n_swa": 7}, []),
    ({"n_swa": 100, "n_ctx": 100}, [FULL, SLIDING, MIXED]),
    ({"n_swa": 100, "n_ctx": 101}, [SLIDING]),
    ({"ctx_checkpoints": 2}, [FULL]),
    ({"n_keep": 4}, []),
    ({"sparse": Strided(block=64, window_blocks=1)}, [SLIDING]),
    ({"sparse": COVERING}, [FULL, SLIDING, MIXED]),
    ({"sparse": BlockTopK(block=64, top=8)}, [FULL, SLIDING, MIXED]),
    ({"sparse": BlockTopK(block=64, top=1, window_blocks=1)}, [SLIDING]),
    ({"sparse": XAttention(block=64, p=0.5)}, [SLIDING]),
    ({"sparse": XAttention(p=1)}, [FULL, SLIDING, MIXED]),
    ({"sparse": TriangleMix(window_blocks=2)}, [SLIDING]),
    ({"sparse": TriangleMix(dense_layers=99)}, [FULL, SLIDING, MIXED]),
    ({"rope_scaling_type": "yarn", "n_ctx": 512}, [FULL, SLIDING, MIXED]),
    ({"rope_scaling_type": "linear", "n_ctx": 513}, []),
    ({"rope_freq_scale": 1.0}, [FULL, SLIDING, MIXED]),
    ({"rope_freq_scale": 0.5}, []),
    ({"rope_freq_base": 10000.0}, [FULL, SLIDING]),
    ({"rope_scaling_type": "none"}, []),
    ({"flash_attn": "disabled"}, []),
    ({"flash_attn": "disabled", "backend": "tiled"}, [FULL, SLIDING, MIXED]),
    ({}, []),
]


@pytest.mark.parametrize("model", [FULL, SLIDING, MIXED])
@pytest.mark.parametrize(("options", "idle"), CASES, ids=[str(case[0]) for case in CASES])
def test_an_option_is_said_to_change_nothing_exactly_where_it_changes_nothing(options, idle, model):
    found = without_effect(facts(model), PARAMS(**options))
    named = set(options) - {"n_ctx", "backend"} if model in idle else set()
    assert set(found) == named
    assert all(reason and not reason.endswith(".") for reason in found.values())


def test_sinks_are_idle_where_no_layer_is_full_attention():
    assert "n_sinks" not in without_effect(facts(MIXED), PARAMS(n_swa=4, n_sinks=2))
    assert set(without_effect(facts(SLIDING), PARAMS(n_swa=4, n_sinks=2))) == {"n_sinks"}


def test_kept_tokens_are_idle_under_a_window():
    assert "n_keep" in without_effect(facts(FULL), PARAMS(n_swa=16, n_keep=2))


def test_one_of_several_rope_options_may_be_idle():
    scaled = PARAMS(rope_scaling_type="yarn", rope_freq_scale=0.5)
    found = without_effect(facts(FULL), replace(scaled, yarn_beta_fast=32.0, yarn_beta_slow=2.0))
    assert set(found) == {"yarn_beta_fast"}


def test_host_memory_is_idle_on_a_cpu_alone():
    params = PARAMS(offload_kqv=False)
    assert "offload_kqv" in without_effect(facts(FULL), params, device="cpu")
    assert not without_effect(facts(FULL), params, device="cuda")
    assert not without_effect(facts(FULL), params)


def test_a_model_without_rotary_positions_has_none_to_scale():
    found = without_effect(gpt2(), PARAMS(rope_scaling_type="yarn", yarn_orig_ctx=64))
    assert set(found) == {"rope_scaling_type", "yarn_orig_ctx"}


def test_a_pattern_that_takes_other_shapes_is_not_judged():
    @dataclass(frozen=True)
    class Picky:
        def select(self, q, kv, q_offset) -> BlockSelection:
            raise ValueError("four heads, please")

    assert not without_effect(facts(FULL), PARAMS(sparse=Picky()))


def test_conversion_to_as_many_heads_changes_nothing():
    assert "2 KV heads" in (no_fewer_heads(facts(FULL), 2) or "")
    assert no_fewer_heads(facts(FULL), 1) is None


@pytest.mark.parametrize("options", [INT8, SNAPKV, {"page_size": 16}, {"n_swa": 8}])
def test_what_is_said_to_change_nothing_changes_nothing(options):
    """The claim itself, on a model whose layers all slide."""
    model, tokens = tiny_model(tiny_config(SLIDING)), torch.arange(3, 103)
    found = []
    for params in (PARAMS(), PARAMS(**options)):
        with saccade.Context(model, params) as ctx:
            ctx.append(tokens[:80])
            ctx.compress()
            found.append((ctx.logits(ctx.append(tokens[80:], wanted=20)), ctx.cache_bytes))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
