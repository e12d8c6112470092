"""What llama.cpp's converter (conversion/*.py) writes for a model: keys and tensors, both by hand.

Names of tensors come from the package `gguf`; nothing here is taken from `saccade.hf.gguf`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

Tensors = dict[str, np.ndarray]


def converted(model: PreTrainedModel, architecture: str) -> tuple[dict[str, Any], Tensors]:
    """(keys without the architecture in front, tensors) of a model."""
    config = model.config
    ids = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(ids[architecture], config.num_hidden_layers)
    tensors = factors(config, architecture)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for old, array in changed(architecture, name, tensor.float().numpy(), config).items():
            new = old if old.startswith("blk.") else _mapped(table, old)
            tensors[new] = np.ascontiguousarray(array)
    return keys(config, architecture), tensors


def _mapped(table: Any, name: str) -> str:
    new = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert new is not None, name
    return new


def keys(config: Any, architecture: str) -> dict[str, Any]:
    c = config.to_dict()
    special = SPECIAL_KEYS.get(architecture)
    if special and special[0]:
        return special[1](config, c)
    found = _base_keys(config, c)
    return found | (special[1](config, c) if special else {})


def _base_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    """TextModel.set_gguf_parameters"""
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": c["max_position_embeddings"],
        "embedding_length": config.hidden_size,
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **_rope_keys(config),
    }
    for name in ("rms_norm_eps", "norm_eps"):
        if c.get(name) is not None:
            found["attention.layer_norm_rms_epsilon"] = c[name]
    for name in ("layer_norm_eps", "norm_epsilon"):
        if c.get(name) is not None:
            found["attention.layer_norm_epsilon"] = c[name]
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count is not None:
        found |= {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if c.get("head_dim") is not None:
        found |= {"attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"]}
    return found


def _rope_keys(config: Any) -> dict[str, Any]:
    both = config.rope_parameters
    rope = both.get("full_attention", both)
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if "sliding_attention" in both:
        found["rope.freq_base_swa"] = float(both["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if name in rope:
                key = "attn_factor" if name == "attention_factor" else name
                found[f"rope.scaling.yarn_{key}"] = float(rope[name])
    return found


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    found = {"vocab_size": config.vocab_size, "rope.dimension_count": _head_dim(config)}
    if c.get("sliding_window"):
        found["attention.sliding_window"] = c["sliding_window"]
    return found


def _partial(config: Any) -> int:
    return int(_head_dim(config) * config.rope_parameters["partial_rotary_factor"])


def _phi3_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    rope = config.rope_parameters
    original = c["original_max_position_embeddings"]
    found = {
        "rope.dimension_count": _partial(config),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": c["sliding_window"] or 0,
        "rope.scaling.type": None,
        "rope.scaling.factor": None,
    }
    if rope["rope_type"] == "longrope":
        scale = c["max_position_embeddings"] / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return found


def _gemma_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if c.get(name):
            found[name] = float(c[name])
    if c.get("sliding_window"):
        found["attention.sliding_window"] = c["sliding_window"]
    return found


def _stablelm_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    return {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "rope.dimension_count": _partial(config),
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "use_parallel_residual": c["use_parallel_residual"],
        "attention.layer_norm_epsilon": c["layer_norm_eps"],
    }


def _old_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    """Falcon, Bloom and GPT-2, whose converters write few keys."""
    hidden = config.hidden_size
    found = {
        "context_length": c.get("max_position_embeddings") or c.get("n_positions") or hidden,
        "embedding_length": hidden,
        "feed_forward_length": 4 * hidden,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": c["layer_norm_epsilon"],
    }
    if config.model_type == "falcon":
        found |= {"tensor_data_layout": "jploski", "attention.head_count_kv": c["num_kv_heads"]}
    if config.model_type == "bloom":
        found["attention.head_count_kv"] = config.num_attention_heads
    return found


def _mamba_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    return {
        "context_length": 2**20,
        "embedding_length": c["hidden_size"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": c["num_hidden_layers"],
        "ssm.conv_kernel": c["conv_kernel"],
        "ssm.inner_size": config.intermediate_size,
        "ssm.state_size": c["state_size"],
        "ssm.time_step_rank": config.time_step_rank,
        "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"],
        "ssm.dt_b_c_rms": config.model_type == "falcon_mamba",
    }


def _lfm2_keys(config: Any, c: dict[str, Any]) -> dict[str, Any]:
    groups = [0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types]
    return {
        "attention.head_count_kv": groups,
        "vocab_size": config.vocab_size,
        "shortconv.l_cache": c["conv_L_cache"],
        "attention.layer_norm_rms_epsilon": c["norm_eps"],
    }


def _qwen_moe_keys(_: Any, c: dict[str, Any]) -> dict[str, Any]:
    found = {"expert_feed_forward_length": c["moe_intermediate_size"]}
    if "shared_expert_intermediate_size" in c:
        found["expert_shared_feed_forward_length"] = c["shared_expert_intermediate_size"]
    return found


SPECIAL_KEYS: dict[str, tuple[bool, Any]] = {
    # architecture: (instead of the base keys, function)
    "llama": (False, _llama_keys),
    "deci": (False, _llama_keys),
    "smollm3": (False, _llama_keys),
    "granite": (
        False,
        lambda config, c: {
            **_llama_keys(config, c),
            "attention.scale": c["attention_multiplier"],
            "embedding_scale": c["embedding_multiplier"],
            "residual_scale": c["residual_multiplier"],
            "logit_scale": c["logits_scaling"],
        },
    ),
    "phi3": (False, _phi3_keys),
    "gemma2": (False, _gemma_keys),
    "gemma3": (False, _gemma_keys),
    "stablelm": (True, _stablelm_keys),
    "falcon": (True, _old_keys),
    "bloom": (True, _old_keys),
    "gpt2": (True, _old_keys),
    "mamba": (True, _mamba_keys),
    "lfm2": (False, _lfm2_keys),
    "qwen2moe": (False, _qwen_moe_keys),
    "qwen3moe": (False, _qwen_moe_keys),
    "qwen2": (False, lambda _, c: {"attention.sliding_window": c["sliding_window"]}),
    "starcoder2": (False, lambda _, c: {"attention.sliding_window": c["sliding_window"]}),
    "gpt-oss": (
        False,
        lambda _, c: {
            "attention.sliding_window": c["sliding_window"],
            "expert_feed_forward_length": c["intermediate_size"],
        },
    ),
    "minimax-m2": (
        False,
        lambda config, c: {
            "expert_feed_forward_length": c["intermediate_size"],
            "rope.dimension_count": _partial(config),
            "expert_gating_func": 2,
        },
    ),
    "nemotron": (
        False,
        lambda config, c: {
            "vocab_size": c["vocab_size"],
            "attention.layer_norm_epsilon": c["norm_eps"],
            "rope.dimension_count": _partial(config),
        },
    ),
}


def factors(config: Any, architecture: str) -> Tensors:
    """generate_extra_tensors of llama and phi3."""
    rope = getattr(config, "rope_parameters", None) or {}
    if architecture == "phi3" and rope["rope_type"] == "longrope":
        names = {
            "rope_factors_long.weight": "long_factor",
            "rope_factors_short.weight": "short_factor",
        }
        return {name: np.array(rope[key], np.float32) for name, key in names.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    dims, trained = _head_dim(config), rope["original_max_position_embeddings"]
    low, high, found = rope["low_freq_factor"], rope["high_freq_factor"], []
    for i in range(0, dims, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / dims)
        smooth = min(1.0, max(0.0, (trained / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


def changed(architecture: str, name: str, array: np.ndarray, config: Any) -> Tensors:
    """modify_tensors: what becomes of one tensor; names that start with blk. are final."""
    layer = (re.findall(r"\.(\d+)\.", name) or ["-"])[0]
    if "experts." in name:
        return _experts(architecture, name, array, layer)
    if architecture in ("llama", "deci", "granite", "smollm3") and (
        "q_proj" in name or "k_proj" in name
    ):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return {name: _permuted(array, heads)}
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return {name: array + 1}
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return {name: array.T}
    if architecture in ("bloom", "falcon") and "query_key_value" in name:
        return {name.replace("transformer.", "" if architecture == "bloom" else "transformer."):
                _ungrouped(array, config)}  # fmt: skip
    if architecture == "bloom":
        return {name.replace("transformer.", ""): array}
    if name.endswith("A_log"):
        return {name: -np.exp(array)}
    if "conv1d.weight" in name or "conv.conv.weight" in name:
        return {name: array.squeeze(1)}
    return _renamed(architecture, name, array, layer)


def _renamed(architecture: str, name: str, array: np.ndarray, layer: str) -> Tensors:
    if "layernorm.norms" in name:  # StableLM: the heads' norms become rows, see `stacked`
        which = "q" if "q_layernorm" in name else "k"
        return {f"blk.{layer}.attn_{which}_norm.weight:{name.split('.')[-2]}": array}
    if name.endswith("sinks"):
        return {name + ".weight": array}
    if name.endswith("e_score_correction_bias"):
        return {f"blk.{layer}.exp_probs_b.bias": array}
    if name.endswith("shared_expert_gate.weight"):
        return {name: array.squeeze(0)}  # the writer drops the dimension of one
    if architecture in ("llama", "minimax-m2") and name.endswith("mlp.gate.weight"):
        return {name.replace("mlp.gate", "block_sparse_moe.gate"): array}
    return {name: array}


def _experts(architecture: str, name: str, array: np.ndarray, layer: str) -> Tensors:
    ending = "bias" if name.endswith("bias") else "weight"
    if architecture == "gpt-oss" and ending == "weight":
        array = array.swapaxes(-1, -2)
    if "down_proj" in name:
        return {f"blk.{layer}.ffn_down_exps.{ending}": array}
    if architecture == "gpt-oss":
        gate, up = array[:, ::2], array[:, 1::2]
    else:
        gate, up = np.split(array, 2, axis=1)
    return {f"blk.{layer}.ffn_gate_exps.{ending}": gate, f"blk.{layer}.ffn_up_exps.{ending}": up}


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def _ungrouped(array: np.ndarray, config: Any) -> np.ndarray:
    heads = config.num_attention_heads
    groups = config.num_kv_heads if config.model_type == "falcon" else heads
    dim = config.hidden_size // heads
    qkv = array.reshape(groups, heads // groups + 2, dim, *array.shape[1:])
    parts = (qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


def stacked(tensors: Tensors) -> Tensors:
    """Rows that were given one by one (`name:number`), as one tensor."""
    whole = {name: array for name, array in tensors.items() if ":" not in name}
    for name in sorted({name.split(":")[0] for name in tensors if ":" in name}):
        rows = sum(key.startswith(name + ":") for key in tensors)
        whole[name] = np.stack([tensors[f"{name}:{i}"] for i in range(rows)])
    return whole
