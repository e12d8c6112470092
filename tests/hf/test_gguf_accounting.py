"""Every key and every tensor of a GGUF file is used, named in a note, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from saccade.core import BadInput
from saccade.hf import load_model
from saccade.hf.gguf import describe
from tests.hf.converter import converted, keys, stacked
from tests.hf.gguf_files import add_key, add_tensor, write_gguf
from tests.hf.test_gguf_architectures import CASES, make

UNUSED = {  # what the model's class has no place for, or another key of the file says again
    "mamba": {"context_length", "feed_forward_length", "attention.head_count"},
    "gpt-oss": {"feed_forward_length"},
    "minimax-m2": {"feed_forward_length"},
    "nemotron": {"attention.layer_norm_rms_epsilon", "vocab_size"},
    "phi3": {"rope.scaling.original_context_length"},
    "llama": {"vocab_size"},
    "deci": {"vocab_size"},
    "smollm3": {"vocab_size"},
    "granite": {"vocab_size"},
    "lfm2": {"vocab_size"},
}


def sentence_about(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def config_of(path: Path) -> dict[str, Any] | None:
    """The config; None where the file is refused."""
    try:
        described = describe(path)
    except BadInput:
        return None
    return (
        None
        if described.notes and "does not know" in described.notes[-1]
        else (described.config.to_dict())
    )


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "-other"
    if isinstance(value, list):
        return value[::-1]
    return value * 2


@pytest.mark.parametrize("case", CASES)
def test_no_key_of_a_converted_file_is_ignored(case, tmp_path):
    """Another value of any of them gives another config, or is refused."""
    architecture = CASES[case][0]
    model, path = make(case), tmp_path / "m.gguf"
    write_gguf(model, path, architecture)
    config = config_of(path)
    assert config is not None
    found, _ = converted(model, architecture)
    for key, value in found.items():
        if not value or key in UNUSED.get(architecture, ()):
            continue
        write_gguf(model, path, architecture, keys={key: other(value)}, skip=("output.weight",))
        assert config_of(path) != {**config, "tie_word_embeddings": True}, key


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_missing_is_named(case, tmp_path):
    architecture, path = CASES[case][0], tmp_path / "m.gguf"
    model = make(case)
    _, tensors = converted(model, architecture)
    names = [name for name in stacked(tensors) if name.startswith("blk.1.") or name == "token_embd"]
    for name in names[:: max(1, len(names) // 2)]:
        write_gguf(model, path, architecture, skip=(name,))
        assert name in sentence_about(path)


@pytest.mark.parametrize(
    "name", ["blk.2.attn_norm.weight", "blk.0.attn_q_norm.weight", "blk.1.ffn_up.bias", "extra"]
)
def test_a_tensor_that_the_model_has_no_place_for(name, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(make("qwen2"), path, "qwen2", tensors={name: np.ones(64)})
    assert f"has no place for: {name}" in sentence_about(path)


def test_a_tensor_of_old_files_that_repeats_the_header_is_skipped(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = {"blk.0.attn.rotary_emb.inv_freq": np.ones(8), "blk.1.attn_rot_embd": np.ones(8)}
    write_gguf(make("llama"), path, "llama", tensors=tensors)
    assert load_model(path).notes == []


def test_a_tensor_of_another_shape(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(make("qwen2"), path, "qwen2", tensors={"blk.1.ffn_up.weight": np.ones((64, 96))})
    assert "model.layers.1.mlp.up_proj.weight" in sentence_about(path)


def test_keys_that_nobody_knows_are_named_in_one_note(tmp_path):
    path = tmp_path / "m.gguf"
    unknown = {"attention.clamp_kqv": 8.0, "logit_scale": 0.5, "nextn_predict_layers": 1}
    write_gguf(make("llama"), path, "llama", keys=unknown)
    (note,) = load_model(path).notes
    assert note == (
        "the file says llama.attention.clamp_kqv, llama.logit_scale, llama.nextn_predict_layers, "
        "which saccade does not know: the model may answer otherwise than it was trained to."
    )


def test_keys_that_change_nothing_are_not_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer_keys = {"rope.scaling.finetuned": True}
    write_gguf(make("llama"), path, "llama", keys=writer_keys)
    assert load_model(path).notes == []


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"attention.layer_norm_rms_epsilon": None}),
        ("llama", {"block_count": None}),
        ("llama", {"block_count": 3}),
        ("llama", {"block_count": 0}),
        ("llama", {"block_count": 2**31 - 1}),
        ("llama", {"block_count": "two"}),
        ("llama", {"attention.head_count": 0}),
        ("llama", {"attention.head_count": 3}),
        ("llama", {"attention.head_count": [4, 2]}),
        ("llama", {"attention.head_count_kv": 3}),
        ("llama", {"attention.value_length": 8}),
        ("llama", {"attention.causal": False}),
        ("llama", {"attention.scale": 0.5}),
        ("llama", {"context_length": None}),
        ("llama", {"embedding_length": 128}),
        ("deci", {"attention.head_count_kv": [2, 1]}),
        ("granite", {"attention.scale": None}),
        ("granite", {"logit_scale": None}),
        ("mixtral", {"expert_used_count": 5}),
        ("mixtral", {"expert_weights_scale": 2.5}),
        ("mixtral", {"expert_gating_func": 2}),
        ("minimax-m2", {"expert_gating_func": 1}),
        ("gpt-oss", {"attention.sliding_window_pattern": [True]}),
        ("gpt-oss", {"attention.sliding_window": -1.0}),
        ("bloom", {"attention.max_alibi_bias": 4.0}),
        ("bloom", {"feed_forward_length": 128}),
        ("falcon 7b", {"tensor_data_layout": "other"}),
        ("stablelm", {"use_parallel_residual": True}),
        ("lfm2", {"attention.head_count_kv": [2, 2, 0]}),
        ("lfm2", {"attention.head_count_kv": 2}),
        ("mamba", {"ssm.inner_size": 100}),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_be(case, changes, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(make(case), path, CASES[case][0], keys=changes)
    message = sentence_about(path)
    assert "could not be loaded by transformers" not in message


@pytest.mark.parametrize(
    ("case", "key", "value", "name", "wanted"),
    [
        ("gemma2", "attention.scale", 1 / 12, "query_pre_attn_scalar", 144),
        ("gpt-oss", "attention.sliding_window_pattern", [False, True], "layer_types",
         ["full_attention", "sliding_attention"]),
        ("gemma3", "attention.sliding_window_pattern", 2, "layer_types",
         ["sliding_attention", "full_attention"] * 3),
        ("gemma3", "attention.sliding_window", None, "layer_types", ["full_attention"] * 6),
        ("gemma3", "attn_logit_softcapping", 7.0, "attn_logit_softcapping", 7.0),
        ("gemma2", "attn_logit_softcapping", None, "attn_logit_softcapping", 50.0),
        ("gemma2", "attention.sliding_window", None, "sliding_window", 4096),
        ("phi3", "attention.sliding_window", 0, "sliding_window", None),
        ("qwen3moe", "expert_weights_norm", False, "norm_topk_prob", False),
        ("qwen2moe", "expert_weights_norm", True, "norm_topk_prob", True),
        ("qwen3moe", "expert_feed_forward_length", None, "moe_intermediate_size", 32),
        ("llama", "attention.head_count_kv", [2, 2], "num_key_value_heads", 2),
        ("llama", "attention.scale", 0.25, "head_dim", 16),
    ],
)  # fmt: skip
def test_what_a_key_becomes(case, key, value, name, wanted, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(make(case), path, CASES[case][0], keys={key: value})
    assert getattr(describe(path).config, name) == wanted


def test_more_tokens_than_rows(tmp_path):
    path = tmp_path / "m.gguf"
    embedding = {"token_embd.weight": np.ones((280, 64)), "output.weight": np.ones((280, 64))}
    write_gguf(make("llama"), path, "llama", tensors=embedding)
    assert "at least 288, the number of tokens" in sentence_about(path)


def test_the_largest_gemmas_scale_by_their_width(tmp_path):
    """27B is told by its number of layers, as llama.cpp does."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    config = make("gemma2").config
    for key, value in (keys(config, "gemma2") | {"block_count": 46}).items():
        add_key(writer, f"gemma2.{key}", value)
    for i in range(46):
        add_tensor(writer, f"blk.{i}.attn_norm.weight", np.ones(64), None)
    add_tensor(writer, "token_embd.weight", np.ones((288, 64)), None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert describe(tmp_path / "m.gguf").config.query_pre_attn_scalar == 64 // 4


@pytest.mark.parametrize("name", [None, "mistral", "Mistral-7B", "phi3 falcon", ""])
def test_the_name_of_a_model_does_not_matter(name, tmp_path):
    writer_name = {} if name is None else {"name": name}
    path = tmp_path / "m.gguf"
    model = make("llama tied, wide heads")
    write_gguf(model, path, "llama", **writer_name)
    loaded = load_model(path)
    assert loaded.model.config.model_type == "llama"
    torch.testing.assert_close(loaded.model.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("architecture", ["clip", "t5", "gemma4", "no such"])
def test_unknown_architecture(architecture, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = sentence_about(tmp_path / "m.gguf")
    assert f"the architecture {architecture!r}, which saccade cannot load from GGUF" in message
    assert "llama" in message
