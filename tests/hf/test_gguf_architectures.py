"""Each architecture of GGUF: a file as llama.cpp's converter writes it gives back the model."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from saccade.hf import load_model
from saccade.hf.gguf.rows import ROWS
from saccade.hf.packed_layers import StoredLayer
from tests.hf.converter import converted, stacked
from tests.hf.gguf_files import write_gguf

IDS = torch.arange(3, 43)[None] % 250
COMMON: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
OLD = {"vocab_size": 288, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
}
SLIDING = ["sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: (architecture of GGUF, model type of transformers, settings)
    "llama": ("llama", "llama", {"rope_parameters": ROPE}),
    "llama biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, wide heads": ("llama", "llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama 3": (
        "llama",
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}},
    ),
    "llama 3.1": (
        "llama",
        "llama",
        {
            "head_dim": 128,
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192},
        },
    ),
    "mistral": ("llama", "mistral", {"sliding_window": 8}),
    "mixtral": (
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "deci": ("deci", "llama", {}),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 5, "rope_parameters": ROPE}),
    "granite": (
        "granite",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 8.0,
        },
    ),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": ROPE}),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen2 yarn magnitude": (
        "qwen2",
        "qwen2",
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "qwen2 window": (
        "qwen2",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 48, "sliding_window": None},
    ),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32, "rope_parameters": ROPE}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {**MOE, "norm_topk_prob": True}),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": SLIDING,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "minimax-m2": (
        "minimax-m2",
        "minimax_m2",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": 8}),
    "phi3 longrope": (
        "phi3",
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi3 partial": (
        "phi3",
        "phi3",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.75}},
    ),
    "gemma": ("gemma", "gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 6,
            "sliding_window": 8,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "nemotron": (
        "nemotron",
        "nemotron",
        {"norm_eps": 1e-4, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": (
        "starcoder2",
        "starcoder2",
        {"norm_epsilon": 1e-4, "rope_parameters": ROPE, "sliding_window": 8},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "stablelm 12b": (
        "stablelm",
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "falcon 7b": ("falcon", "falcon", {**OLD, "num_attention_heads": 4, "num_kv_heads": 1}),
    "falcon 11b": (
        "falcon",
        "falcon",
        {
            **OLD,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon 40b": (
        "falcon",
        "falcon",
        {
            **OLD,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
        },
    ),
    "bloom": ("bloom", "bloom", {**OLD, "n_head": 4, "layer_norm_epsilon": 1e-4}),
    "gpt2": (
        "gpt2",
        "gpt2",
        {"vocab_size": 288, "n_embd": 64, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    ),
    "mamba": ("mamba", "mamba", {**OLD, "state_size": 8}),
    "falcon mamba": ("mamba", "falcon_mamba", {**OLD, "state_size": 8}),
    "lfm2": (
        "lfm2",
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,
        },
    ),
}


AVAILABLE = [case for case in CASES if CASES[case][0] in gguf.MODEL_ARCH_NAMES.values()]
"""Those that the installed package gguf can write."""


def make(case: str, **changes: Any) -> Any:
    """A model with random weights, sharp attention, and norms that are not all ones."""
    if case not in AVAILABLE:
        pytest.skip(f"this version of gguf knows no {CASES[case][0]}")
    _, model_type, settings = CASES[case]
    old = settings.get("n_head") or settings.get("num_attention_heads") or "mamba" in case
    layers = {"num_hidden_layers": 2, "eos_token_id": 2}
    config = AutoConfig.for_model(
        model_type, **{**(layers if old else COMMON), **settings, **changes}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 or "sinks" in name:
                weight.add_(torch.randn(weight.shape), alpha=0.2)
            elif any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key")):
                weight.mul_(6)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.randn(buffer.shape))
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_converted_file_gives_back_the_model(case, tmp_path):
    model = make(case)
    path = tmp_path / "m.gguf"
    write_gguf(model, path, CASES[case][0])
    loaded = load_model(path)
    wanted, got = model(IDS).logits, loaded.model(IDS).logits
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    expected = ("sqrt(256)", "of its own", "tokenizer")
    assert [note for note in loaded.notes if not any(part in note for part in expected)] == []


def test_every_row_has_a_case():
    assert {architecture for architecture, *_ in CASES.values()} == set(ROWS)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_packed_blocks_give_the_model_that_their_numbers_give(case, tmp_path):
    """Every matrix in Q8_0, which the f32 form turns into numbers with the package gguf."""
    model, kind = make(case), gguf.GGMLQuantizationType.Q8_0
    weights = stacked(converted(model, CASES[case][0])[1])
    matrices = [n for n, a in weights.items() if len(a.shape) >= 2 and a.shape[-1] % 32 == 0]
    write_gguf(model, tmp_path / "m.gguf", CASES[case][0], quantized=dict.fromkeys(matrices, kind))
    plain, packed = (
        load_model(tmp_path / "m.gguf", weights=form).model for form in ("f32", "file")
    )
    own = dict(packed.named_modules())
    stored = 0
    for name, layer in plain.named_modules():
        if isinstance(own[name], StoredLayer):
            weight = layer.weight.T if type(layer) is Conv1D else layer.weight
            torch.testing.assert_close(own[name].weight, weight, rtol=1e-6, atol=1e-7)
            stored += 1
        elif isinstance(layer, nn.Linear):  # a row that is no matrix in the file
            assert torch.equal(own[name].weight, layer.weight)
    assert stored >= 3
    wanted, got = (each(IDS).logits.double().log_softmax(-1) for each in (plain, packed))
    assert (wanted.exp() * (wanted - got)).sum(-1).mean() < 1e-3
