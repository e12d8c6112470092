"""Tiny configs of every causal language model class that transformers knows.

One set of sizes serves almost all of them: each class takes those of its own fields that are
listed here.  What a family needs besides stands in `EXCEPTIONS`, one row a family.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: Final[tuple[str, ...]] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type of `AutoModelForCausalLM` in the installed transformers."""

VOCAB: Final = 128
LAYERS: Final = 4
WINDOW: Final = 8
LARGEST: Final = 40_000_000
"""Parameters; a larger config was not made tiny and is an error of this file."""

_SHARPENED: Final = re.compile(
    r"(^|[._])(q|k|query|key|q_lin|k_lin|qkv|q_proj|k_proj|qkv_proj|query_key_value|c_attn|Wqkv"
    r"|q_b_proj|kv_b_proj|project_q|project_k|query_proj)\.weight$"
)
SHARPER: Final = 2.0
"""Queries and keys of random weights are small, and attention is nearly flat without this."""

_WIDTH: Final = (
    *("hidden_size", "d_model", "n_embd", "embedding_size", "decoder_hidden_size", "dim"),
    *("word_embed_proj_dim", "hidden_dim"),
)
_INNER: Final = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff", "dim_ff", "d_inner"),
    *("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size", "intermediate_size_mlp"),
    *("ffn_hidden_dim", "dense_intermediate_size"),
)
_EXPERT: Final = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size",),
)
_LAYERS: Final = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("num_decoder_layers",),
)
_HEADS: Final = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    *("num_decoder_attention_heads", "encoder_attention_heads"),
)
_LENGTH: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

SIZES: Final[dict[str, Any]] = {
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_EXPERT, 32),
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_LENGTH, 512),
    **dict.fromkeys(_EXPERTS, 4),
    "vocab_size": VOCAB,
    "encoder_layers": 1,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # what is done to embeddings, scores and logits
    "initializer_range": 0.1,
    "logits_scaling": 3.0,
    "logit_scale": 0.4,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 5.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "lm_head_multiplier": 0.6,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    # recurrent layers
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "state_size": 8,
    "n_mamba_heads": 2,
}

_LATENT: Final[dict[str, Any]] = {"num_key_value_heads": 4, "head_dim": 8}
_TWO_KINDS: Final = ["linear_attention", "full_attention"] * 2
_TEXT: Final = "text_config"
_PER_LAYER: Final = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
_FOUR_WINDOWS: Final = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
}
_GEMMA4: Final = {**_PER_LAYER, **_FOUR_WINDOWS, "global_head_dim": 32, "num_kv_shared_layers": 1}
_INKLING: Final = {
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **{"swa_head_dim": 16, "sliding_window_size": WINDOW, "unpadded_vocab_size": ...},
    **{"n_shared_experts": 1, "rel_extent": 16, "d_rel": 4},
}
_DOTS3: Final = {
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim")},
    **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "sliding_window": WINDOW},
    **{"head_dim": 24, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "shared_experts_intermediate_size": 32,
}
_QWEN4: Final = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
    **{"indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64},
    **{"hc_lowrank": 8, "split_ngram_parts": 2},
}

EXCEPTIONS: Final[dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(
        ("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT
    ),
    "dots3_note_text": {**_LATENT, **_DOTS3},
    "dots3_note": {
        _TEXT: {**_LATENT, **_DOTS3},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"downsample_hidden_size": 8, "adapter_out_dim": 64},
    },
    "bailing_hybrid": {**_LATENT, "layer_types": _TWO_KINDS},
    "kimi_linear": {
        **{**_LATENT, "layer_types": _TWO_KINDS, "linear_head_dim": 16, "linear_num_heads": 4}
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _TWO_KINDS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "zamba": {"layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xlstm": {**dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "num_blocks"), ...)},
    "xmod": {"default_language": "en_XX"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            }
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma3_text": _FOUR_WINDOWS,
    "gemma3": {_TEXT: _FOUR_WINDOWS},
    "gemma4_assistant": {_TEXT: {**_GEMMA4, "hidden_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {_TEXT: {**_GEMMA4, "hidden_size_per_layer_input": 0}},
    "musicgen": {"text_encoder": {}, "audio_encoder": {}},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {**_PER_LAYER, "num_kv_shared_layers": 1, **_FOUR_WINDOWS, "laurel_rank": 8},
    "gemma3n": {
        _TEXT: {**_PER_LAYER, "num_kv_shared_layers": 1, **_FOUR_WINDOWS, "laurel_rank": 8}
    },
    "gemma4_text": _GEMMA4,
    "gemma4": {_TEXT: _GEMMA4, "vision_config": {"position_embedding_size": 64}},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified": {_TEXT: _GEMMA4},
    "inkling_text": _INKLING,
    "inkling2_text": _INKLING,
    "roc_bert": {"shape_vocab_size": 64, "shape_embed_dim": 8, "pronunciation_vocab_size": 64},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {_TEXT: _QWEN4},
    "prophetnet": {"num_hidden_layers": ..., "num_layers": ..., "n_layer": ...},
    "xlnet": {"max_position_embeddings": ..., "d_inner": 96},
    "recurrent_gemma": {"max_position_embeddings": 512, "attention_window_size": WINDOW},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 64]},
}
"""model type -> fields that differ from `SIZES`."""


DECODER_OF: Final = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Model types whose class takes a part of their config."""


def tiny_config(name: str, *, layers: int = LAYERS, **changes: Any) -> PreTrainedConfig:
    """A small config of a model type; `changes` count over everything else."""
    config = _shrunk(CONFIG_MAPPING[name], {**EXCEPTIONS.get(name, {}), **changes}, layers)
    return getattr(config, DECODER_OF[name]) if name in DECODER_OF else config


def _shrunk(kind: type[PreTrainedConfig], own: dict[str, Any], layers: int) -> PreTrainedConfig:
    default, parts = kind(), dict[str, Any](kind.sub_configs)  # type: ignore[call-overload]
    fields = {name: value for name, value in SIZES.items() if _settable(default, name)}
    fields |= {name: layers for name in _LAYERS if name in fields}
    for name, nested in parts.items():
        given = getattr(default, name, None)
        part: Any = type(given) if isinstance(given, PreTrainedConfig) else nested
        if isinstance(part, type) and issubclass(part, PreTrainedConfig):
            fields[name] = _shrunk(part, own.get(name, {}), layers).to_dict()
    fields |= {name: _cut(value, layers) for name, value in own.items() if name not in parts}
    return kind(**{name: value for name, value in fields.items() if value is not ...})


def _cut(value: Any, layers: int) -> Any:
    """A list with an entry a layer for fewer layers."""
    return value[-layers:] if isinstance(value, list) and len(value) == LAYERS else value


def _settable(config: PreTrainedConfig, name: str) -> bool:
    """Whether a config class has this field, and not as a fixed property."""
    found = getattr(type(config), name, None)
    if isinstance(found, property):
        return found.fset is not None
    return name in vars(config) or name in type(config).attribute_map or found is not None


def tiny_model(name: str, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of that config on eager attention, with attention that matters.

    Raises:
        ValueError: a config that is not tiny.
    """
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    if not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size} parameters, more than {LARGEST}.")
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "sinks" in path:
                weight.normal_(0, 1)
            elif weight.dim() == 2 and _SHARPENED.search(path):
                weight.mul_(SHARPER)
    return model
