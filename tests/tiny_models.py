"""Tiny random decoders of the families we support: real architectures, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 8
GEMMA: dict[str, Any] = {**COMMON, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "gemma2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ),
    "phi3": lambda: Phi3Config(**COMMON, partial_rotary_factor=0.5),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**{**COMMON, **LATENT, "head_dim": 8}),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a family, with some fields changed."""
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    return config


def tiny_model(config: Any, attn_implementation: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A random float32 model of that config, with attention strong enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    )
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "sinks" in path:
                weight.normal_(0, 1)
            elif weight.dim() == 2 and any(p in path for p in ("q_proj", "k_proj", "qkv_proj")):
                weight.mul_(6)
    return model.eval()
