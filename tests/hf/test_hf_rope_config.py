"""Rope parameters with impossible values: one sentence, whoever meets them first."""

from __future__ import annotations

import json

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.hf import rope_config
from saccade.hf.rope import rotary_modules
from saccade.hf.rope_config import check_tables
from saccade.hf.scaled_rotary import scaled_rotary
from saccade.runtime.params import ContextParams
from tests.tiny_models import tiny_config, tiny_model

LISTS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32, **LISTS}
BAD = {
    "a text": "yarn",
    "a list": [1, 2],
    "type is a number": {"rope_type": 3},
    "type is unknown": {"rope_type": "su"},
    "no base": {"rope_theta": None},
    "base is a text": {"rope_theta": "1e4"},
    "base is negative": {"rope_theta": -1.0},
    "base is 0": {"rope_theta": 0},
    "base is NaN": {"rope_theta": float("nan")},
    "factor is a text": {"rope_type": "linear", "factor": "2"},
    "factor is None": {"rope_type": "linear", "factor": None},
    "factor is 0": {"rope_type": "linear", "factor": 0},
    "factor is negative": {"rope_type": "linear", "factor": -2.0},
    "dynamic factor is negative": {"rope_type": "dynamic", "factor": -3.0},
    "trained length is negative": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": -5,
    },
    "base of 1": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
    "divisors are a text": {**LONG, "short_factor": "abc"},
    "too few short divisors": {**LONG, "short_factor": [1.0] * 3},
    "too few long divisors": {**LONG, "long_factor": [1.0] * 5},
    "negative divisors": {**LONG, "short_factor": [-1.0] * 8},
    "divisors of 0": {**LONG, "long_factor": [0] * 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved llama; its config is written anew by each test."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config("llama", num_hidden_layers=1)).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_in_one_sentence(folder, name):
    config = json.loads((folder / "config.json").read_text())
    given = BAD[name]
    config["rope_parameters"] = {"rope_theta": 1e4, **given} if isinstance(given, dict) else given
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as caught:
        saccade.Context(saccade.load_model(folder).model)
    assert "\n" not in str(caught.value) and "rope" in str(caught.value).lower()


def test_lists_of_another_length_say_what_is_expected():
    parameters = {"rope_theta": 1e4, **LONG, "long_factor": [1.0] * 5}
    model = tiny_model(tiny_config("llama", rope_parameters=parameters))
    with pytest.raises(BadInput, match="must be finite numbers .* one per pair"):
        saccade.Context(model)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
@pytest.mark.parametrize("asking", ["_table", "_joins_rows"])
def test_an_error_of_the_device_is_not_blamed_on_the_config(error, asking, monkeypatch):
    model = tiny_model(tiny_config("llama"))
    module = next(rotary_modules(model))
    monkeypatch.setattr(type(module), "forward", raising(error))
    if asking == "_table":
        monkeypatch.setattr(rope_config, "_table", raising(error))
        with pytest.raises(type(error)) as raised:
            check_tables([module])
    else:
        with pytest.raises(type(error)) as raised:
            scaled_rotary(module, model.config, ContextParams(rope_freq_scale=0.5))
    assert raised.value is error


def raising(error):
    def fails(*_, **__):
        raise error

    return fails
