"""What the keys that a model computes depend on, as texts that a session can compare.

Weights alone do not say what a model computes: the same weights under another softcap, activation,
window or number of experts give other keys.  So the whole config counts, as it is now, and what the
modules have copied from it when they were built.  Values need not be understood to be compared, so
nothing here is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.hf.layers import text_config

SAMPLES: Final = 64
"""Numbers of each weight that go into the fingerprint of a model."""
_BOOKKEEPING: Final = frozenset(
    {
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a config that do not change what a model computes; dtypes are those of the weights."""
_STATE: Final = frozenset(
    {"forward", "generate", "gradient_checkpointing", "max_seq_len_cached", "training"}
)
"""Attributes of modules that change while a model runs or is attached."""


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """Class, config, and fingerprints of the weights and of the modules of a model as it is now."""
    config = {f"config.{name}": value for name, value in _fields(text_config(model))}
    return {
        "class": type(model).__name__,
        **config,
        "weights": weights_fingerprint(model),
        "modules": _modules_fingerprint(model),
    }


def as_text(value: Any) -> str:
    """JSON with sorted keys; what JSON does not know is written as Python shows it."""
    try:
        return json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError):  # keys of several types, or a value that contains itself
        return str(value)


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes and evenly spaced numbers of all weights: a sample, so it is fast.

    It tells models and fine-tunes apart, not a model whose few numbers were edited by hand.
    """
    digest = hashlib.sha256()
    weights = dict((*model.named_parameters(), *_buffers(model)))
    for name, weight in sorted(weights.items(), key=lambda item: item[0]):
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(0, len(flat) - 1), SAMPLES, dtype=torch.float64).long()
        sample = flat[at.to(flat.device)].float().cpu() if len(flat) else flat.float().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are as good as weights; not rotary tables that change with the length."""
    for path, module in model.named_modules():
        kinds = as_text(getattr(module, "rope_type", None))  # one, or one of each layer type
        if "dynamic" not in kinds and "longrope" not in kinds:
            yield from module.named_buffers(path, recurse=False)


def _fields(config: Any) -> Iterator[tuple[str, str]]:
    """(name, value) of every field of a config that may change what is computed."""
    for name, value in sorted(config.to_dict().items()):
        if not name.startswith("_") and name not in _BOOKKEEPING:
            yield name, as_text(value)


def _modules_fingerprint(model: nn.Module) -> str:
    """sha256 of the classes of all modules and of the plain values that they keep."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        digest.update(f"{path} {type(module).__qualname__} {_kept(module)}\n".encode())
    return digest.hexdigest()


def _kept(module: nn.Module) -> list[tuple[str, str]]:
    """The numbers, texts and functions among a module's own attributes."""
    changing = tuple(_STATE)  # models with a table for each layer type put its name in front
    return sorted(
        (name, _shown(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and not name.endswith(changing) and name not in _BOOKKEEPING
        and _is_plain(value)
    )  # fmt: skip


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    function = callable(value) and not isinstance(value, nn.Module)
    return function or value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return str([_shown(each) for each in value])
    if callable(value):  # whose repr would have an address in it
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
