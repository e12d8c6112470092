"""Tiny GGUF files, written as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def write_gguf(
    model: PreTrainedModel, path: Path, architecture: str, *, yarn: dict[str, Any] | None = None
) -> None:
    """The weights of a tiny model in float32, with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, model.config)
    if yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(yarn["original"])
        if "attn_factor" in yarn:
            writer.add_rope_scaling_attn_factors(yarn["attn_factor"])
    _write_tokenizer(writer, model.config.vocab_size, "llama")
    names = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[architecture], model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            config = model.config
            is_query = "q_proj" in key
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            weight = _interleaved(weight, heads)
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(0)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, kind: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES]
    tokens += [f"▁t{i}" for i in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * len(BYTES) + [1] * (len(tokens) - 3 - len(BYTES)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """q and k rows in the order that GGUF's llama rotates them (pairs are neighbours)."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
