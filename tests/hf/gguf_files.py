"""Tiny GGUF files, written as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from tests.hf.converter import converted, stacked

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    architecture: str,
    *,
    yarn: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    skip: tuple[str, ...] = (),
    quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
    tokens: bool = True,
    name: str | None = None,
    eot: int | None = None,
    **options: Any,
) -> None:
    """The weights of a tiny model in float32, with a byte-level tokenizer.

    Args:
        keys: beside or instead of what the converter writes; None removes one.
        tensors: beside or instead of the converter's.
        skip: names of tensors to leave out.
        quantized: name of a tensor -> its type.
        name: of the model.
        options: of the writer: `split_max_tensors`, `endianess`.
    """
    found, weights = converted(model, architecture)
    weights = stacked(weights) | (tensors or {})
    if yarn is not None:
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": yarn["factor"]}
        found["rope.scaling.original_context_length"] = yarn["original"]
        if "attn_factor" in yarn:
            found["rope.scaling.attn_factor"] = yarn["attn_factor"]
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in (found | (keys or {})).items():
        add_key(writer, f"{architecture}.{key}", value)
    writer.add_file_type(0)
    if name is not None:
        writer.add_name(name)
    if tokens:
        _write_tokenizer(writer, model.config.vocab_size, "llama")
    if eot is not None:
        writer.add_eot_token_id(eot)
    for tensor, array in weights.items():
        if tensor not in skip:
            add_tensor(writer, tensor, array, (quantized or {}).get(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, array: Any, kind: gguf.GGMLQuantizationType | None
) -> None:
    array = np.array(array, np.float32, order="C")  # a copy: writers swap bytes in place
    if kind is None:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key with the type that the converter gives such a value."""
    if value is None:
        return
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


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
