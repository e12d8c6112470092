"""Loading a model from a GGUF file, a transformers folder, or a name, without any network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from saccade.core import BadInput
from saccade.hf.facts import trained_length
from saccade.hf.folder import folder_config, folder_model
from saccade.hf.foreign_errors import as_bad_input, is_out_of_memory, quiet, reason
from saccade.hf.gguf import check_tensors, describe, load_weights
from saccade.hf.gguf_tokenizer import gguf_tokenizer
from saccade.hf.packed_layers import weights_bytes
from saccade.hf.packed_model import left_plain
from saccade.hf.tensor_files import named
from saccade.runtime.located import located
from saccade.runtime.placement import Form, device_of, form_and_dtype
from saccade.units import as_bytes

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: in evaluation mode, on saccade's attention.
        tokenizer: None where the files bring none that can be read.
        name: for tables.
        n_ctx_train: length it was trained for, in tokens.
        weights: the form of its weights in a few words ("Q4_K, Q6_K as in the file").
        notes: what the files hold that is not used, or lack and is assumed, a sentence each.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    name: str
    n_ctx_train: int
    weights: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def weights_bytes(self) -> int:
        """Memory that the weights take, those that layers share counted once."""
        return weights_bytes(self.model)


def load_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "file",
) -> LoadedModel:
    """Load a model from a `.gguf` file, a transformers folder, or a name ("smollm2").

    Nothing is ever fetched.  Weights are read one at a time, and take the memory of their form:

    file    as in the file: on a CPU a GGUF's own blocks, computed as they are; a folder's
            own dtype.  On a GPU a GGUF is dequantized to `dtype`.
    int8    linear layers and output head rounded to 8 bits in groups of 32, embeddings too
    int4    the same in 4 bits; embeddings and output head, which cost most, in 8
    bf16    plain bfloat16
    f32     plain float32: exactly what a GGUF file says, and what training and conversions need

    Of a split model any file stands for all.

    Args:
        device: where it runs: "cpu" (default), "cuda", "cuda:N", or "auto", a GPU if there is one.
        dtype: of activations, caches and weights that are plain numbers; default what the config
            says for folders, and else float32 on a CPU and bfloat16 on a GPU.
        weights: their form.

    Raises:
        BadInput: nothing there, not a model, damaged, incomplete, an unknown architecture, weights
            that do not fit the config or have another form already, a device that is not there, or
            a package that loading needs is not installed.
        TypeError: another kind of source, device, dtype or weights.
        ValueError: weights of no such name, or of a form that excludes the dtype.
        MemoryError: there is not enough of it for the weights.
    """
    where = device_of(device)
    path = located(source)
    is_folder = path.is_dir()
    form, own = form_and_dtype(weights, dtype, where, is_folder=is_folder)
    if is_folder:
        loaded = _load_folder(path, own, form)
    else:
        _need_gguf()
        loaded = _load_gguf(path, own or torch.float32, form)
    if form in ("int8", "int4") and (plain := left_plain(loaded.model)):
        loaded.notes.append(_said_of(plain, form, loaded.model.dtype))
    if form == "plain" and weights == "file" and not is_folder:
        loaded.notes.append(
            f"the weights of {path.name} are {loaded.weights} on this device: a GPU computes with "
            'plain numbers. weights="int8" or "int4" take less memory there, and more time.'
        )
    return _moved(loaded, where)


def _said_of(plain: Mapping[str, int], form: str, dtype: torch.dtype) -> str:
    which = f"{as_bytes(sum(plain.values()))}: {named(plain)}"
    return (
        f"{len(plain)} matrices ({which}) stay {str(dtype).removeprefix('torch.')}: {form} rounds "
        "linear layers and embeddings with rows of whole groups of 32, and no experts."
    )


def _moved(loaded: LoadedModel, device: torch.device) -> LoadedModel:
    model: Any = loaded.model
    model.to(device)
    return loaded


def read_config(source: str | Path) -> tuple[PreTrainedConfig, str, int]:
    """(config, name, trained length) of what `load_model` would load; no weights are read.

    Its `dtype` is the one that weights would get.

    Raises:
        BadInput: as `load_model`.
    """
    path = located(source)
    if path.is_dir():
        config, _ = folder_config(path)
        return config, path.name, trained_length(config)
    _need_gguf()
    with quiet(), as_bad_input(path):
        described = describe(path)
        check_tensors(described)
    described.config.dtype = torch.float32
    return described.config, described.name, described.n_ctx_train


def _need_gguf() -> None:
    if find_spec("gguf") is None:
        raise BadInput(
            "reading GGUF needs the package gguf, which is not installed: "
            'run in the clone of saccade: pip install ".[hf]".'
        )


def _load_gguf(path: Path, dtype: torch.dtype, form: Form) -> LoadedModel:
    with quiet(), as_bad_input(path):
        described = describe(path)
        model, weights = load_weights(described, dtype, form)
    notes = described.notes
    return LoadedModel(
        model=model,
        tokenizer=_gguf_tokenizer(described.facts.file.keys, model, notes),
        name=described.name,
        n_ctx_train=described.n_ctx_train,
        weights=weights,
        notes=notes,
    )


def _load_folder(path: Path, dtype: torch.dtype | None, form: Form) -> LoadedModel:
    config, notes = folder_config(path)
    model, weights, found = folder_model(path, config, dtype, form)
    notes += found
    where = {"pretrained_model_name_or_path": path, "trust_remote_code": False}
    if any((path / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = _tokenizer(where, notes)
    else:  # transformers would invent an empty one
        tokenizer = None
        notes.append(f"the folder {path.name} holds no tokenizer.")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=path.name,
        n_ctx_train=trained_length(config),
        weights=weights,
        notes=notes,
    )


def _gguf_tokenizer(
    keys: Mapping[str, Any], model: PreTrainedModel, notes: list[str]
) -> Any | None:
    """The tokenizer in the header; what ends an answer goes to the model's generation config."""
    try:
        tokenizer, ends, found = gguf_tokenizer(keys)
    except Exception as error:  # the library refuses a damaged vocabulary in many ways
        if is_out_of_memory(error):
            raise
        notes.append(f"no tokenizer could be read: {reason(error)}")
        return None
    notes += found
    if ends and model.can_generate():
        model.generation_config.eos_token_id = ends
    return tokenizer


def _tokenizer(where: dict[str, Any], notes: list[str]) -> Any | None:
    """The tokenizer beside the weights; None, with a note, if there is none."""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(**where, local_files_only=True)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        if is_out_of_memory(error):
            raise
        notes.append(f"no tokenizer could be read: {reason(error)}")
        return None
