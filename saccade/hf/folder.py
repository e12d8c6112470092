"""A folder saved by transformers: its config and weights, with nothing missing or left over."""

from __future__ import annotations

import json
import logging as standard_logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from saccade.core import BadInput
from saccade.hf.folder_weights import read_folder, round_layers
from saccade.hf.foreign_errors import as_bad_input, quiet
from saccade.hf.meta_model import without_memory
from saccade.hf.rope_config import explained
from saccade.hf.tensor_files import Tensors, named, tensors_in
from saccade.runtime.placement import Form

_LARGEST: Final = 2**31 - 1
_MOST_LAYERS: Final = 10_000
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_NUMBER: Final = re.compile(r"\d+")
_RECOMPUTED: Final = re.compile(r".*(inv_freq|masked_bias|\.attn\.bias|position_ids)")
"""Buffers that old versions saved; they follow from the config."""


def folder_config(path: Path) -> tuple[PreTrainedConfig, list[str]]:
    """The config of a folder, and a note for each thing in it that transformers does not know.

    Raises:
        BadInput: no config.json, or one that describes no model.
    """
    file = path / "config.json"
    if not file.is_file():
        raise BadInput(
            f"the folder {path} has no config.json: expected a model saved by transformers "
            "(save_pretrained), or a .gguf file."
        )
    with as_bad_input(path):
        if not isinstance(json.loads(file.read_bytes()), dict):
            raise BadInput(f"{file} holds no settings: expected a JSON object.")
    with as_bad_input(path), _rope_warnings() as warnings:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        check_sizes(str(file), config)
    return config, [f"config.json: {warning}" for warning in warnings]


def folder_model(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype | None, form: Form = "plain"
) -> tuple[PreTrainedModel, str, list[str]]:
    """The model in evaluation mode, the form of its weights, and what its files hold besides.

    Raises:
        BadInput: weights are missing, damaged, of another shape, left over, or have another form
            already.
    """
    files = tensors_in(path)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and form != "plain":
        raise BadInput(
            f"the weights of {path} are quantized already, and cannot be rounded to {form}: load "
            'them with weights="file".'
        )
    with quiet(), as_bad_input(path), explained(config):
        _check_layers(path, config, files)
        shapes, notes = without_memory(config)
        _check_amount(path, config, shapes, files)
        model = info = None
        if dtype is not None and files is not None and not quantized:
            model, info = read_folder(shapes, config, files, dtype, form)
        if model is None or info is None:
            model, info = _mapped(path, config, shapes, dtype)
            if dtype is not None and form != "plain":
                round_layers(model, form, dtype)
        else:
            _take_settings(model, path)
    if info["missing_keys"]:
        raise BadInput(
            f"{path} lacks {len(info['missing_keys'])} of the model's weights: "
            f"{named(info['missing_keys'])}. The folder is incomplete: download or save it again."
        )
    said = str(model.dtype).removeprefix("torch.") if form == "plain" else form
    return model.eval(), said, notes + _left_over(path, shapes, set(info["unexpected_keys"]))


def _take_settings(model: PreTrainedModel, path: Path) -> None:
    """What transformers reads of a folder beside config and weights."""
    changed: Any = model
    changed.config.name_or_path = changed.name_or_path = str(path)
    if model.can_generate() and (path / "generation_config.json").is_file():
        changed.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _mapped(
    path: Path, config: PreTrainedConfig, shapes: PreTrainedModel, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As transformers loads it: safetensors whose dtype stays are the file itself, mapped."""
    kind: Any = type(shapes)
    return kind.from_pretrained(
        path,
        config=config,
        dtype=dtype or "auto",
        attn_implementation=shapes.config._attn_implementation,
        local_files_only=True,
        output_loading_info=True,
    )


def _left_over(path: Path, model: PreTrainedModel, keys: set[str]) -> list[str]:
    """A note about weights of parts that the model does not have; none may belong to its own."""
    keys = {key for key in keys if not _RECOMPUTED.fullmatch(key)}
    own = {_NUMBER.sub("{}", name) for name in model.state_dict()}
    modules = {name.rpartition(".")[0] for name in model.state_dict()}
    wrong = {k for k in keys if _NUMBER.sub("{}", k) in own or k.rpartition(".")[0] in modules}
    if wrong:
        raise BadInput(
            f"{path} has {len(wrong)} weights that the model of its config.json has no place for: "
            f"{named(wrong)}. It would answer wrongly without them: correct the config."
        )
    if not keys:
        return []
    return [f"{len(keys)} weights belong to parts that text does not need: {named(keys)}."]


def check_sizes(where: str, config: PreTrainedConfig) -> None:
    """Refuse sizes that no model has, before a model is built of them.

    Raises:
        BadInput: which one, and what it is.
    """
    text = config.get_text_config(decoder=True)
    for name in _SIZES:
        try:
            value = getattr(text, name, None)
        except Exception:  # of each layer its own (AmbiguousGlobalPerLayerAttributeError)
            continue
        most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        for size in value if isinstance(value, list | tuple) else [value]:
            if size is not None and (type(size) is not int or not 0 < size <= most):
                raise BadInput(
                    f"{where} has {name} = {size!r}: expected a whole number from 1 to {most}."
                )


def _check_layers(path: Path, config: PreTrainedConfig, files: Tensors | None) -> None:
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if files is not None and layers > len(files):
        raise BadInput(
            f"config.json of {path} says {layers} layers, and its files hold {len(files)} "
            "tensors: expected several for each layer. The folder is incomplete or damaged."
        )


def _check_amount(
    path: Path, config: PreTrainedConfig, model: PreTrainedModel, files: Tensors | None
) -> None:
    """Refuse before memory is reserved for weights that the files cannot hold."""
    if getattr(config, "quantization_config", None) is not None:
        return  # quantized numbers share elements
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if files is None:  # a number has at least one byte
        held = sum(file.stat().st_size for file in path.glob("*.bin")) or wanted
    else:
        held = sum(math.prod(file.shape) for file in files.values())
    if wanted > held:
        raise BadInput(
            f"the model in config.json of {path} has {wanted:,} weights, its files hold {held:,}: "
            "they are incomplete or belong to another config."
        )


@contextmanager
def _rope_warnings() -> Iterator[list[str]]:
    """What transformers warns of about `rope_parameters` meanwhile, instead of printing it."""
    found: list[str] = []

    class Collect(standard_logging.Handler):
        def emit(self, record: standard_logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if "nrecognized keys" in text and "rope" in text:
                found.append(text)

    logger: Any = logging.get_logger("transformers")
    handler, level = Collect(), logging.get_verbosity()
    logging.disable_default_handler()
    logger.addHandler(handler)
    logging.set_verbosity_warning()
    try:
        yield found
    finally:
        logging.set_verbosity(level)
        logger.removeHandler(handler)
        logging.enable_default_handler()
