"""Sessions of models whose rope parameters hold keys that no rule here has."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.hf import HFModel
from saccade.hf.rope_labels import normalised, rope_labels
from saccade.runtime.params import ContextParams
from tests.tiny_models import tiny_config, tiny_model

BASE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **BASE}
STATED = {
    "left over factor": {"rope_type": "default", "factor": 8.0, **BASE},
    "llama_4_scaling_beta": {**YARN, "llama_4_scaling_beta": 0.1},
    "attn_factor": {**YARN, "attn_factor": 0.87},
    "max_position_embeddings": {**YARN, "max_position_embeddings": 512},
    "finetuned": {**YARN, "finetuned": True},
    "mrope_section": {"rope_type": "default", "mrope_section": [2, 3, 3], **BASE},
    "factor below 1": {"rope_type": "linear", "factor": 0.5, **BASE},
    "nested beside flat": {"rope_type": "default", "full_attention": {"rope_theta": 1.0}, **BASE},
    "no number": {"rope_type": "default", "beta": float("nan"), **BASE},
}
IDS = list(range(3, 30))


def model_of(parameters):
    return tiny_model(tiny_config("llama", rope_parameters=parameters, num_hidden_layers=2))


def saved(path, model, params):
    with saccade.Context(model, params) as ctx:
        tokens = [token.token for token in ctx.stream(IDS, n_predict=3)]
        saccade.save_session(path, ctx)
    return tokens


@pytest.mark.parametrize("name", STATED)
def test_a_session_is_kept_and_restored(tmp_path, name):
    model, params = model_of(STATED[name]), ContextParams()
    tokens = saved(tmp_path / "x", model, params)
    with saccade.Context(model, params) as ctx:
        saccade.load_session(tmp_path / "x", ctx)
        assert ctx.tokens == [*IDS, *tokens[: len(ctx.tokens) - len(IDS)]]


@pytest.mark.parametrize("name", ["attn_factor", "mrope_section"])
def test_another_value_of_such_a_key_is_another_model(tmp_path, name):
    saved(tmp_path / "x", model_of(STATED[name]), ContextParams())
    changed = {**STATED[name], "attn_factor": 0.5, "mrope_section": [4, 2, 2]}
    with (
        saccade.Context(model_of(changed), ContextParams()) as ctx,
        pytest.raises(BadInput, match="was saved with another model: its .*rope_parameters is"),
    ):
        saccade.load_session(tmp_path / "x", ctx)


def test_what_the_modules_compute_counts_too(tmp_path):
    """Somebody has changed the buffers, and the config does not say so."""
    model = model_of({"rope_type": "default", **BASE})
    saved(tmp_path / "x", model, ContextParams())
    rotary = model.model.rotary_emb
    for held in (rotary.inv_freq, rotary.original_inv_freq):
        held.mul_(1.001)
    with (
        saccade.Context(model, ContextParams()) as ctx,
        pytest.raises(BadInput, match="was saved with another model: its"),
    ):
        saccade.load_session(tmp_path / "x", ctx)


def test_the_last_bit_of_another_machine_is_forgiven():
    model = model_of({"rope_type": "default", **BASE})
    before = rope_labels(model, {})
    for held in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
        held.copy_(torch.nextafter(held, held + 1))
    assert rope_labels(model, {}) == before


def test_known_rules_have_their_names():
    labels = HFModel(model_of(YARN)).identity()
    assert labels["rope of all layers"].startswith("ParsedRope(rule=YaRN(factor=4.0")
    assert "rope_parameters" not in labels


def test_one_number_in_two_types_is_the_same():
    assert normalised({"b": 2, "a": [1, None], "c": None}) == '{"a": [1.0, null], "b": 2.0}'
    assert normalised({"a": True}) == '{"a": true}'
