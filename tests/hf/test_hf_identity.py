"""Two models have one identity only if they compute the same from the same tokens."""

import copy

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.hf.model import HFModel
from saccade.runtime import ContextParams
from tests.tiny_models import tiny_config, tiny_model

CONFIGS = {
    "activation": ("llama", {"hidden_act": "gelu"}),
    "norm epsilon": ("llama", {"rms_norm_eps": 1e-3}),
    "rope base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "softcap": ("gemma2", {"attn_logit_softcapping": 7.0}),
    "final softcap": ("gemma2", {"final_logit_softcapping": 7.0}),
    "scale": ("gemma2", {"query_pre_attn_scalar": 64}),
    "window": ("mistral", {"sliding_window": 9}),
    "layer types": ("gemma3", {"layer_types": ["full_attention"] * 4}),
    "experts per token": ("gpt_oss", {"num_experts_per_tok": 1}),
}
LIVE = {
    "config": lambda m: setattr(m.config, "logits_scaling", 3.0),
    "scale": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5),
    "epsilon": lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 0.1),
    "activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
    "frequencies": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a buffer": lambda m: m.model.norm.register_buffer("shift", torch.ones(3)),
}
BOOKKEEPING = {
    "_name_or_path": "another/name",
    "use_cache": False,
    "eos_token_id": 7,
    "transformers_version": "9.9",
    "architectures": ["Other"],
}
TOKENS = torch.arange(3, 33)[None]


def identity(model):
    return HFModel(model).identity()


@pytest.mark.parametrize("what", CONFIGS)
def test_the_same_weights_under_another_config(what):
    family, changes = CONFIGS[what]
    one = tiny_model(tiny_config(family))
    config = copy.deepcopy(one.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = tiny_model(config)
    other.load_state_dict(one.state_dict())
    assert identity(one) != identity(other)
    with torch.no_grad():
        assert not torch.equal(one(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.parametrize("what", LIVE)
def test_a_model_that_was_changed_after_loading(what):
    model = tiny_model(tiny_config("llama"))
    before = identity(model)
    with torch.no_grad():
        LIVE[what](model)
    assert identity(model) != before


def test_bookkeeping_does_not_count():
    model = tiny_model(tiny_config("llama"))
    before = identity(model)
    for name, value in BOOKKEEPING.items():
        setattr(model.config, name, value)
    model.config._attn_implementation = "eager"
    with saccade.attach(model, ContextParams(fused_layers=True)):
        assert identity(model) == before


def test_rope_keys_that_cannot_be_parsed_are_compared_as_they_are(tmp_path):
    def model(section):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
        return tiny_model(tiny_config("llama", rope_parameters=rope))

    with saccade.Context(model([2, 3, 3])) as ctx:
        list(ctx.stream([5, 6], n_predict=2))
        saccade.save_session(tmp_path / "s", ctx)
    with saccade.Context(model([2, 3, 3])) as ctx:
        saccade.load_session(tmp_path / "s", ctx)
    with (
        saccade.Context(model([4, 2, 2])) as ctx,
        pytest.raises(BadInput, match="another model: its config.rope_parameters is"),
    ):
        saccade.load_session(tmp_path / "s", ctx)
