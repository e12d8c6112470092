"""Folders: missing, left-over and misshapen weights and impossible configs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.core import BadInput
from saccade.hf import load_model
from saccade.hf.load import read_config
from tests.tiny_models import tiny_config, tiny_model

WEIGHT = "model.layers.2.mlp.up_proj.weight"


def saved(path: Path, family: str = "llama", **options: Any) -> Path:
    tiny_model(tiny_config(family)).save_pretrained(path, **options)
    return path


def sentence_about(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def change_config(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def change_weights(path: Path, change: Any) -> Path:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_missing_weight(tmp_path):
    saved(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(WEIGHT))
    assert "its files hold" in sentence_about(tmp_path)


def test_a_missing_weight_whose_place_another_one_fills(tmp_path):
    saved(tmp_path)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["vision_tower.weight"] = weights.pop(WEIGHT)

    message = sentence_about(change_weights(tmp_path, change))
    assert f"lacks 1 of the model's weights: {WEIGHT}" in message


@pytest.mark.parametrize(
    "name", ["model.layers.4.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"]
)
def test_a_left_over_weight_of_a_part_that_the_model_has(tmp_path, name):
    saved(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(3)}))
    assert f"no place for: {name}" in sentence_about(tmp_path)


def test_weights_of_a_part_that_the_model_lacks_are_named(tmp_path):
    saved(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"vision.scale": torch.ones(3)}))
    notes = load_model(tmp_path).notes
    assert any(
        "1 weights belong to parts that text does not need: vision.scale" in n for n in notes
    )


def test_a_buffer_that_follows_from_the_config_is_not_mentioned(tmp_path):
    saved(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(8)}))
    assert load_model(tmp_path).notes == [f"the folder {tmp_path.name} holds no tokenizer."]


def test_a_weight_of_another_shape(tmp_path):
    saved(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({WEIGHT: torch.ones(64, 96)}))
    assert "mismatch" in sentence_about(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 20, 1000, 100_000])
def test_a_truncated_weight_file(tmp_path, size):
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is truncated or damaged" in sentence_about(tmp_path)


def test_a_shard_that_is_missing(tmp_path):
    saved(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    message = sentence_about(tmp_path)
    assert f"lacks 1 of its weight files: {shards[1].name}" in message


def test_a_shard_without_a_tensor_that_the_index_names(tmp_path):
    saved(tmp_path, max_shard_size="200KB")
    shard = max(tmp_path.glob("*.safetensors"))
    weights = load_file(shard)
    name = min(weights)
    del weights[name]
    save_file(weights, shard, metadata={"format": "pt"})
    assert f"lack 1 tensors that model.safetensors.index.json names: {name}" in sentence_about(
        tmp_path
    )


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(tmp_path, index):
    saved(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "expected a weight_map of file names" in sentence_about(tmp_path)


def test_a_folder_without_weights(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    assert "could not be loaded by transformers" in sentence_about(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\xff", '{"model_type": "llama"'])
def test_a_config_that_is_no_object(tmp_path, text):
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    sentence_about(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -3},
        {"num_hidden_layers": "four"},
        {"num_hidden_layers": 2**70},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**31},
        {"hidden_size": 2**30},
        {"hidden_size": -64},
        {"vocab_size": 0},
        {"vocab_size": 2**40},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3.5},
        {"num_attention_heads": [4]},
        {"num_key_value_heads": 0},
        {"intermediate_size": "96"},
        {"head_dim": -1},
        {"rms_norm_eps": "small"},
        {"hidden_act": "no such function"},
        {"hidden_act": 3},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "no such rule"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"model_type": None},
        {"model_type": 3},
        {"model_type": "no such model"},
        {"model_type": "bert"},
        {"architectures": 3, "model_type": "t5"},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
    ],
    ids=str,
)
def test_an_impossible_config(tmp_path, changes):
    sentence_about(change_config(saved(tmp_path), **changes))


def test_a_validation_error_keeps_its_reason(tmp_path):
    message = sentence_about(change_config(saved(tmp_path), rms_norm_eps="small"))
    assert "rms_norm_eps" in message and "float" in message


def test_a_rope_key_that_transformers_does_not_know_is_named(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "attn_wobble": 0.5}
    notes = load_model(change_config(saved(tmp_path), rope_parameters=rope)).notes
    assert any("attn_wobble" in note for note in notes)


def test_more_layers_than_weights_are_refused_before_they_are_built(tmp_path):
    change_config(saved(tmp_path), num_hidden_layers=2_000_000_000)
    assert "num_hidden_layers = 2000000000" in sentence_about(tmp_path)
    change_config(tmp_path, num_hidden_layers=9000)
    assert "9000 layers" in sentence_about(tmp_path)


@pytest.mark.parametrize("hidden", [2**24, 64])
def test_weights_that_were_saved_by_torch(tmp_path, hidden):
    model = tiny_model(tiny_config("llama"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    change_config(tmp_path, hidden_size=hidden)
    if hidden == 64:
        torch.testing.assert_close(load_model(tmp_path).model.lm_head.weight, model.lm_head.weight)
    else:
        assert "its files hold" in sentence_about(tmp_path)


def test_models_whose_config_names_their_length_otherwise(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    _, _, length = read_config(tmp_path)
    assert length == 77
