"""Sizes read straight from files are those that transformers' own model has."""

import json
from dataclasses import replace

import pytest
import torch

from saccade.hf.plan import _blueprint_of, blueprint
from saccade.runtime.plan_files import blueprint_of, from_config
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2, some layers slide": ("qwen2", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "qwen3": ("qwen3", {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_gives_the_sizes_of_the_model(case, tmp_path):
    family, changes = CASES[case]
    tiny_config(family, **changes).save_pretrained(tmp_path)
    ours = blueprint_of(tmp_path, None, torch.float32)
    theirs = blueprint(tmp_path)
    assert ours == theirs and ours is not None
    assert ours.weights_bytes == theirs.weights * ours.facts.dtype.itemsize > 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gguf_header_gives_the_sizes_of_the_model(family, dtype, tmp_path):
    model = tiny_model(tiny_config(family, vocab_size=300))
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path, family)
    ours, theirs = blueprint_of(path, dtype, torch.float32), blueprint(path, dtype)
    assert ours is not None and ours.weights == sum(p.numel() for p in model.parameters())
    assert ours == theirs


def test_what_is_not_plain_is_left_to_transformers(tmp_path):
    plain = json.loads(tiny_config("llama").to_json_string())
    assert from_config(plain, "x", None) is not None
    for changes in (
        {"model_type": "gemma3_text"}, {"quantization_config": {"bits": 4}}, {"hidden_size": "64"},
        {"num_attention_heads": 0}, {"dtype": "float8_e4m3fn"}, {"layer_types": ["full_attention"]},
        {"head_dim": -1}, {"tie_word_embeddings": "yes"}, {"partial_rotary_factor": 0.5},
    ):  # fmt: skip
        assert from_config({**plain, **changes}, "x", None) is None, changes
    (tmp_path / "config.json").write_text("[1]")
    assert blueprint_of(tmp_path, None, torch.float32) is None
    damaged = tmp_path / "x.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=300)), damaged, "llama")
    for content in (b"", b"GGUF", damaged.read_bytes()[:300], b"no" * 50):
        damaged.write_bytes(content)
        assert blueprint_of(damaged, None, torch.float32) is None


def test_experts_that_a_token_does_not_use_are_idle():
    config = tiny_config("gpt_oss")
    model = tiny_model(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    found = _blueprint_of(config, "x", None, torch.float32)
    assert found.idle == experts // 2 and found.inner == 2 * config.intermediate_size
    assert found.layers == found.weights - found.idle - 2 * found.head
    assert replace(found, idle=0).layers - found.layers == found.idle
