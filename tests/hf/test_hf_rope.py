"""Scaled rotary positions of a loaded model against a model that transformers built so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, GPT2Config

from saccade.core import Unsupported
from saccade.hf import attach, rotary_frequencies
from saccade.hf.rope import ropes_in_force
from saccade.hf.runs import run_in_force
from saccade.hf.scaled_rotary import scaled_rotary
from saccade.rope import Linear, Unscaled, YaRN
from saccade.runtime.params import ContextParams
from tests.tiny_models import COMMON, tiny_config, tiny_model

BASE = {"rope_theta": 10000.0}
CASES = {
    "linear": (
        ContextParams(rope_scaling_type="linear", n_ctx=2048),
        {"rope_type": "linear", "factor": 4.0, **BASE},
    ),
    "linear by scale alone": (
        ContextParams(rope_freq_scale=0.25),
        {"rope_type": "linear", "factor": 4.0, **BASE},
    ),
    "yarn": (
        ContextParams(rope_scaling_type="yarn", n_ctx=2048),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            **BASE,
        },
    ),
    "yarn with options": (
        ContextParams(
            rope_scaling_type="yarn",
            n_ctx=512,
            yarn_orig_ctx=64,
            yarn_beta_fast=16.0,
            yarn_beta_slow=2.0,
            yarn_attn_factor=1.25,
        ),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            **BASE,
        },
    ),
    "dynamic": (
        ContextParams(rope_scaling_type="dynamic", n_ctx=1024),
        {"rope_type": "dynamic", "factor": 2.0, **BASE},
    ),
    "base": (
        ContextParams(rope_freq_base=500000.0),
        {"rope_type": "default", "rope_theta": 500000.0},
    ),
}


def rotary(model):
    return model.model.rotary_emb


def rule(model):
    """The scaling rule in force."""
    run = run_in_force(model)
    return ropes_in_force(model, {} if run is None else run.rotary)[None].rule


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_model_built_with_that_config(ids, family, case):
    params, parameters = CASES[case]
    config = tiny_config(family)
    partial = config.rope_parameters.get("partial_rotary_factor")
    if partial is not None:
        parameters = {**parameters, "partial_rotary_factor": partial}
    changes = {"rope_parameters": parameters}
    if family == "phi3":  # states the trained length outside the dict, where it wins
        trained = parameters.get("original_max_position_embeddings", 512)
        changes["original_max_position_embeddings"] = trained
    built = tiny_model(tiny_config(family, **changes))
    model = tiny_model(config)
    with attach(model, params):
        found = rotary_frequencies(model)
        torch.testing.assert_close(
            found.inv_freq.float(), rotary(built).inv_freq, atol=0, rtol=1e-6
        )
        assert found.attention_factor == pytest.approx(rotary(built).attention_scaling, rel=1e-6)
        torch.testing.assert_close(model(ids).logits, built(ids).logits, atol=1e-4, rtol=1e-4)


LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
OTHERS = {
    "glm4": {},  # neighbours, half of a head
    "cohere": {},
    "nanochat": {},
    "phi": {},
    "stablelm": {},
    "ernie4_5": {},
    "apertus": {},  # llama3 scaling of its own
    "ministral3": {  # yarn of its own, and keys that rotary modules do not read
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "deepseek_v2": LATENT,  # complex numbers
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 96, "layer_types": None},
    "laguna": {  # parameters by layer type, another share of a head in each
        "layer_types": ["full_attention", "sliding_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "sliding_window": 8,
    },
    "granite_swa": {},  # a module for each base
}
RULES = {
    "linear": ({}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"yarn_orig_ctx": 256},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    ),
}


def others_config(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    return CONFIG_MAPPING[family](**{**COMMON, "num_hidden_layers": 2, **OTHERS[family]})


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("kind", RULES)
def test_other_layouts_equal_a_model_built_with_that_config(ids, family, kind):
    options, parameters = RULES[kind]
    config = others_config(family)
    own = config.rope_parameters
    if "full_attention" in own:
        changed = {**own, "full_attention": {**own["full_attention"], **parameters}}
    else:
        changed = {name: own[name] for name in own if name != "type"} | parameters
    model, config = tiny_model(config), others_config(family)
    config.rope_parameters = changed
    built = tiny_model(config)
    built.load_state_dict(model.state_dict())
    plain, expected = model(ids).logits, built(ids).logits
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()
    with attach(model, ContextParams(rope_scaling_type=kind, rope_freq_scale=0.25, **options)):
        found = model(ids).logits
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=limit, rtol=1e-4)


def test_a_module_that_does_something_else_is_refused():
    """Its tables do not follow from its config, so those of another rule are not known."""
    model = tiny_model(tiny_config("llama"))
    rotary(model).original_inv_freq.mul_(0.9)
    with pytest.raises(Unsupported, match="LlamaRotaryEmbedding cannot be scaled here: it does"):
        attach(model, ContextParams(rope_freq_scale=0.5)).__enter__()


class Joined(nn.Module):
    """As modules for pictures: three rows of positions become one."""

    def __init__(self, module):
        super().__init__()
        self.inner, self.rope_type, self.config = module, module.rope_type, module.config
        self.register_buffer("inv_freq", module.inv_freq)

    def forward(self, x, position_ids):
        return self.inner(x, position_ids[0] if position_ids.dim() == 3 else position_ids)


def test_a_module_that_joins_three_rows_scales_text_alone():
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(rope_freq_scale=0.5)
    found = scaled_rotary(Joined(rotary(model)), model.config, params)
    x, at = torch.zeros(1, 1, 64), torch.arange(6)[None]
    expected = scaled_rotary(rotary(model), model.config, params)(x, at)
    rows = (at, at.expand(3, -1, -1), at[None].repeat(3, 1, 1))
    for ours in (found(x, given) for given in rows):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    picture = at[None] * torch.tensor([1, 2, 3])[:, None, None]
    with pytest.raises(Unsupported, match="positions are those of text"):
        found(x, picture)


def test_three_rows_that_nothing_reads_change_nothing():
    model = tiny_model(tiny_config("llama"))
    model.config.rope_parameters["mrope_section"] = [2, 3, 3]
    found = scaled_rotary(rotary(model), model.config, ContextParams(rope_freq_scale=0.5))
    assert found.ropes[None].rule == Linear(factor=2.0)


def test_a_trained_length_that_also_scales_queries_is_that_of_the_config():
    """Ministral 3: `llama_4_scaling_beta` and the length of the config scale queries."""
    own = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "llama_4_scaling_beta": 0.1}
    own["original_max_position_embeddings"] = 128
    model = tiny_model(tiny_config("llama", rope_parameters=own))
    with pytest.raises(ValueError, match="yarn_orig_ctx=16 differs from the 128 tokens"):
        attach(
            model, ContextParams(rope_scaling_type="yarn", rope_freq_scale=0.5, yarn_orig_ctx=16)
        ).__enter__()
    scaled_rotary(rotary(model), model.config, ContextParams(rope_freq_scale=0.5))


def test_options_that_would_change_nothing_are_refused():
    """Every layer is a sliding one, and those keep their positions."""
    model = tiny_model(tiny_config("gemma3", layer_types=["sliding_attention"] * 4))
    with pytest.raises(Unsupported, match="no frequencies of full_attention layers"):
        attach(model, ContextParams(rope_freq_scale=0.5)).__enter__()


@torch.no_grad()
def test_dynamic_grows_with_the_sequence():
    """Past training every length has its own frequencies, as in transformers."""
    params, parameters = CASES["dynamic"]
    built = rotary(tiny_model(tiny_config("llama", rope_parameters=parameters)))
    model = tiny_model(tiny_config("llama"))
    with attach(model, params):
        for length in (16, 600, 900, 100):
            x, positions = torch.zeros(1, length, 64), torch.arange(length)[None]
            for ours, theirs in zip(rotary(model)(x, positions), built(x, positions), strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@torch.no_grad()
def test_angles_are_made_in_float64():
    model = tiny_model(tiny_config("llama"))
    with attach(model, ContextParams(rope_scaling_type="none")):
        position = torch.tensor([[1_000_003]])
        cos, _ = rotary(model)(torch.zeros(1, 1, 64), position)
        exact = torch.cos(position.double() * rotary_frequencies(model).inv_freq)
        torch.testing.assert_close(cos[0, :, :8], exact.float(), atol=1e-7, rtol=0)


@torch.no_grad()
def test_layer_types_of_gemma3_are_scaled_apart(ids):
    parameters = tiny_config("gemma3").rope_parameters
    scaled = {
        **parameters["full_attention"],
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = tiny_config("gemma3", rope_parameters={**parameters, "full_attention": scaled})
    built, model = tiny_model(config), tiny_model(tiny_config("gemma3"))
    with attach(model, ContextParams(rope_scaling_type="yarn", n_ctx=2048)):
        torch.testing.assert_close(model(ids).logits, built(ids).logits, atol=1e-4, rtol=1e-4)
        for kind in ("full_attention", "sliding_attention"):
            ours = rotary_frequencies(model, kind)
            theirs = getattr(rotary(built), f"{kind}_inv_freq")
            torch.testing.assert_close(ours.inv_freq.float(), theirs, atol=0, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("truncate", [True, False])
def test_nested_truncate_is_honoured_or_refused(truncate):
    """Some versions of transformers read `truncate` from the outer dict and so ignore it here."""
    flat = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 1e6,
        "truncate": truncate,
    }
    parameters = {**tiny_config("gemma3").rope_parameters, "full_attention": flat}
    model = tiny_model(tiny_config("gemma3", rope_parameters=parameters))
    same = ContextParams(rope_scaling_type="yarn", rope_freq_scale=1 / 8)
    exact = rotary(tiny_model(tiny_config("llama", rope_parameters=flat))).inv_freq
    own = rotary(model).full_attention_inv_freq
    if not torch.allclose(own, exact, atol=0, rtol=1e-6):
        with pytest.raises(Unsupported, match="does not return the tables that follow"):
            attach(model, same).__enter__()
        return
    with attach(model, same):
        ours = rotary_frequencies(model, "full_attention").inv_freq.float()
    torch.testing.assert_close(ours, exact, atol=0, rtol=1e-6)


def test_yarn_models_keep_what_they_were_trained_with():
    own = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
        **BASE,
    }
    model = tiny_model(tiny_config("gpt_oss", rope_parameters=own))
    with attach(model, ContextParams(rope_scaling_type="yarn", n_ctx=1024)):
        found = rule(model)
    assert found == YaRN(factor=8.0, original_max_position=128, truncate=False)
    with attach(model, ContextParams(rope_scaling_type="none")):
        assert rule(model) == Unscaled()


def test_the_newest_params_alone_count_and_modules_stay(llama):
    before = rotary(llama)
    with attach(llama, ContextParams(rope_freq_scale=0.5)):
        assert rule(llama) == Linear(factor=2.0)
        with attach(llama, ContextParams(rope_freq_base=500.0)):
            assert rule(llama) == Unscaled()
        with attach(llama):
            assert rule(llama) == Unscaled()
        assert rule(llama) == Linear(factor=2.0)
        assert rotary(llama) is before
    assert rule(llama) == Unscaled() and "forward" not in vars(before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_a_cache_is_not_read_under_other_positions(llama, ids, kind):
    params = ContextParams(rope_scaling_type=kind, n_ctx=2048)
    with attach(llama, params) as outer:
        cache = outer.new_cache()
        llama(ids, past_key_values=cache)
        with attach(llama), pytest.raises(Unsupported, match="with other rotary positions"):
            llama(ids, past_key_values=cache)
        with attach(llama, params):  # the same positions
            llama(ids, past_key_values=cache)
    with attach(llama), pytest.raises(Unsupported, match="with other rotary positions"):
        llama(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (ContextParams(rope_scaling_type="yarn"), "needs to know how far to stretch"),
        (ContextParams(yarn_beta_fast=16.0), "yarn options need rope_scaling_type='yarn'"),
        (
            ContextParams(rope_scaling_type="ntk", n_ctx=1024, yarn_attn_factor=1.0),
            "rule in force is NTKAware",
        ),
    ],
)
def test_options_that_do_not_fit(llama, params, message):
    with pytest.raises(ValueError, match=message):
        attach(llama, params).__enter__()


def test_models_without_rotary_positions():
    model = tiny_model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    with pytest.raises(Unsupported, match="GPT2LMHeadModel has no rotary positions"):
        attach(model, ContextParams(rope_freq_scale=0.5)).__enter__()
