"""The table: for each architecture of GGUF, what its keys are called in transformers' config.

`names` are keys that have only another name there; `steps` are the rest.  Both follow what
llama.cpp's converter writes and its loader assumes where a key is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from saccade.hf.gguf import steps, tensors
from saccade.hf.gguf.facts import Facts, missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One architecture: its class in transformers, its keys, its tensors."""

    model_type: str
    names: Mapping[str, str]
    steps: tuple[steps.Step, ...]
    sources: tensors.Sources


def values_of(facts: Facts, row: Row) -> steps.Values:
    """The arguments of the config.

    Raises:
        BadInput: a key or tensor that must be there is missing, or a value cannot be.
    """
    values: steps.Values = {}
    for key, name in row.names.items():
        values[name] = facts.real(key) if key.endswith("epsilon") else facts.integer(key)
    layers = facts.integer("block_count")
    present = facts.layers_with("blk.*.attn_norm.weight")
    if layers > len(facts.file.tensors) or layers > len(present):
        lost = min(set(range(len(present) + 1)) - present)
        raise missing(facts.file, [f"blk.{lost}.attn_norm.weight"])
    for step in (steps.vocabulary, *row.steps):
        step(facts, values)
    return values


def _llama(facts: Facts) -> Row:
    """One architecture of GGUF for Llama, Mistral (with a window) and Mixtral (with experts)."""
    if facts.integer("expert_count", 0, least=0):
        return MIXTRAL
    facts.get("expert_used_count")
    facts.get("tensor_data_layout")  # of old files, which knew no other one
    if facts.integer("attention.sliding_window", 0, least=0):
        return replace(LLAMA, model_type="mistral", steps=(steps.heads, steps.rope(), steps.window))
    return LLAMA


def _mamba(facts: Facts) -> Row:
    """Falcon's Mamba differs by norms without weights."""
    normed = facts.flag("ssm.dt_b_c_rms", False)
    return replace(MAMBA, model_type="falcon_mamba") if normed else MAMBA


_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_RMS: Final = _SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_BIASES: Final = steps.present(
    attention_bias="blk.*.attn_q.bias",
    mlp_bias="blk.*.ffn_up.bias",
)

LLAMA: Final = Row(
    model_type="llama",
    names=_RMS,
    steps=(steps.heads, steps.rope(), _BIASES),
    sources=tensors.LLAMA,
)
MIXTRAL: Final = Row(
    model_type="mixtral",
    names=_RMS,
    steps=(
        steps.heads,
        steps.rope(),
        steps.window,
        steps.experts("num_local_experts", width="intermediate_size", gating=(1,)),
    ),
    sources=tensors.MIXTRAL,
)
_QWEN2: Final = Row(
    model_type="qwen2",
    names=_RMS,
    steps=(steps.heads, steps.rope(), steps.qwen_windows),
    sources=tensors.QWEN2,
)
_GEMMA2: Final = Row(
    model_type="gemma2",
    names=_RMS,
    steps=(
        steps.gemma_scale(46),
        steps.heads,
        steps.rope(),
        steps.windows(2, default=4096),
        steps.softcaps(50.0, 30.0),
        steps.present(attention_bias="blk.*.attn_q.bias"),
    ),
    sources=tensors.GEMMA2,
)

MAMBA: Final = Row(
    model_type="mamba",
    names={
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "state_size",
        "ssm.time_step_rank": "time_step_rank",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    },
    steps=(steps.mamba, steps.present(use_conv_bias="blk.*.ssm_conv1d.bias")),
    sources=tensors.MAMBA,
)

ROWS: Final[Mapping[str, Row | Callable[[Facts], Row]]] = {
    "llama": _llama,
    "deci": LLAMA,
    "smollm3": replace(LLAMA, model_type="smollm3"),
    "granite": replace(
        LLAMA,
        model_type="granite",
        steps=(steps.multipliers, steps.heads, steps.rope(), _BIASES),
    ),
    "qwen2": _QWEN2,
    "qwen2moe": replace(
        _QWEN2,
        model_type="qwen2_moe",
        steps=(
            steps.heads,
            steps.rope(),
            steps.qwen2_moe_windows,
            steps.experts("num_experts", width="moe_intermediate_size", gating=(1,), normed=False),
            steps.shared_expert,
            steps.present(qkv_bias="blk.*.attn_q.bias"),
        ),
        sources=tensors.QWEN2_MOE,
    ),
    "qwen3": replace(
        _QWEN2, model_type="qwen3", steps=(*_QWEN2.steps, _BIASES), sources=tensors.QWEN3
    ),
    "qwen3moe": replace(
        _QWEN2,
        model_type="qwen3_moe",
        steps=(
            *_QWEN2.steps,
            steps.experts("num_experts", width="moe_intermediate_size", gating=(1,), normed=True),
            steps.present(attention_bias="blk.*.attn_q.bias"),
        ),
        sources=tensors.QWEN3_MOE,
    ),
    "gpt-oss": Row(
        model_type="gpt_oss",
        names=_RMS,
        steps=(
            steps.heads,
            steps.rope(truncate=False),
            steps.windows(2),
            steps.experts("num_local_experts", width="intermediate_size", gating=(1, 3)),
            steps.present(attention_bias="blk.*.attn_q.bias"),
        ),
        sources=tensors.GPT_OSS,
    ),
    "minimax-m2": Row(
        model_type="minimax_m2",
        names=_RMS,
        steps=(
            steps.heads,
            steps.rope(partial=True),
            steps.experts("num_local_experts", width="intermediate_size", gating=(2,)),
        ),
        sources=tensors.MINIMAX_M2,
    ),
    "phi3": Row(
        model_type="phi3",
        names=_RMS,
        steps=(
            steps.heads,
            steps.rope(partial=True, tables_only=True),
            steps.trained_length,
            steps.window,
        ),
        sources=tensors.PHI3,
    ),
    "gemma": Row(
        model_type="gemma",
        names=_RMS,
        steps=(steps.heads, steps.rope(), steps.present(attention_bias="blk.*.attn_q.bias")),
        sources=tensors.GEMMA,
    ),
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2,
        model_type="gemma3_text",
        steps=(
            steps.gemma_scale(62),
            steps.heads,
            steps.gemma3_rope,
            steps.windows(6),
            steps.softcaps(None, None),
            steps.present(attention_bias="blk.*.attn_q.bias"),
        ),
    ),
    "nemotron": Row(
        model_type="nemotron",
        names=_SIZES,
        steps=(steps.layer_norm_eps("norm_eps"), steps.heads, steps.rope(partial=True), _BIASES),
        sources=tensors.NEMOTRON,
    ),
    "starcoder2": Row(
        model_type="starcoder2",
        names=_SIZES,
        steps=(
            steps.layer_norm_eps("norm_epsilon"),
            steps.heads,
            steps.rope(),
            steps.window,
            steps.present(use_bias="blk.*.attn_q.bias"),
        ),
        sources=tensors.STARCODER2,
    ),
    "stablelm": Row(
        model_type="stablelm",
        names=_SIZES,
        steps=(
            steps.layer_norm_eps("layer_norm_eps"),
            steps.heads,
            steps.rope(partial=True),
            steps.present(
                use_qkv_bias="blk.*.attn_q.bias", qk_layernorm="blk.*.attn_q_norm.weight"
            ),
            steps.absent(use_parallel_residual="blk.*.ffn_norm.weight"),
            lambda facts, values: facts.must_be(
                "use_parallel_residual", values["use_parallel_residual"], "as its tensors say"
            ),
        ),
        sources=tensors.STABLELM,
    ),
    "falcon": Row(
        model_type="falcon",
        names={
            "context_length": "max_position_embeddings",
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count": "num_attention_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        steps=(
            steps.falcon,
            steps.rope(),
            steps.present(bias="blk.*.attn_qkv.bias"),
            steps.constant(alibi=False),
        ),
        sources=tensors.FALCON,
    ),
    "bloom": Row(
        model_type="bloom",
        names={
            "context_length": "seq_length",
            "block_count": "n_layer",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        steps=(
            steps.qkv_heads_are_heads,
            steps.must_be("what Bloom has", attention__max_alibi_bias=8.0),
            lambda facts, values: facts.must_be(
                "feed_forward_length", 4 * values["hidden_size"], "4 times embedding_length"
            ),
        ),
        sources=tensors.BLOOM,
    ),
    "gpt2": Row(
        model_type="gpt2",
        names={
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        steps=(steps.qkv_heads_are_heads,),
        sources=tensors.GPT2,
    ),
    "mamba": _mamba,
    "lfm2": Row(
        model_type="lfm2",
        names=_SIZES
        | {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        steps=(
            steps.lfm2,
            steps.rope(theta=1000000.0),
            steps.present(conv_bias="blk.*.shortconv.conv.bias"),
            steps.constant(block_auto_adjust_ff_dim=False),
        ),
        sources=tensors.LFM2,
    ),
}
"""Architecture, as GGUF spells it -> row."""

ALIASES: Final = {
    "gpt_oss": "gpt-oss",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "minimax_m2": "minimax-m2",
}
"""Other spellings that occur."""
