"""Reading the header of a GGUF file ourselves: to refuse early, and to repair what is dropped.

transformers leaves two things out that change what a model computes: Llama's `rope.scaling.*`
(a model stretched by YaRN would run unstretched) and Qwen3's `attention.key_length` (its heads
would get the wrong size).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from saccade.core import BadInput

_MAGIC: Final = b"GGUF"
_SPELLED: Final = {  # how GGUF writes what transformers writes otherwise
    "gpt-oss": "gpt_oss",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "minimax-m2": "minimax_m2",
}
_SCALINGS: Final = ("linear", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """The facts of a GGUF header that we use; None where the file does not say.

    Attributes:
        architecture: as GGUF spells it.
        context_length: tokens the model serves; key_length: head_dim.
        rope_scaling: "linear", "yarn", "none" or None; with what YaRN
            says beside it.
    """

    architecture: str
    context_length: int | None
    key_length: int | None
    rope_scaling: str | None
    rope_factor: float | None
    rope_original: int | None
    rope_magnitude: float | None
    rope_beta_fast: float | None
    rope_beta_slow: float | None


@contextmanager
def shared_reading() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, however often transformers reads it.

    The reader needs seconds for the token list of a header, and transformers builds it anew for
    config, weights and tokenizer, and the table of tensor names once per module.  Both are looked
    up in the package `gguf` at call time, so they are replaced there by caching versions meanwhile.
    """
    import gguf

    read, names = gguf.GGUFReader, gguf.get_tensor_name_map
    remembered = cache(read)
    gguf.GGUFReader = lambda path, *mode: remembered(str(path), *mode)  # type: ignore[assignment]
    gguf.get_tensor_name_map = cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = read, names


def check_gguf(path: Path) -> GGUFHeader:
    """The header of a complete GGUF file of an architecture that transformers can load.

    Raises:
        BadInput: not GGUF, truncated or damaged, or an unknown architecture.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise BadInput(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}. "
            "Expected a .gguf file, or a folder saved by transformers."
        )
    fields = _fields(path)
    header = _header(fields)
    known = _SPELLED.get(header.architecture, header.architecture)
    if known not in GGUF_SUPPORTED_ARCHITECTURES:
        supported = ", ".join(a for a in GGUF_SUPPORTED_ARCHITECTURES if a not in _NOT_MODELS)
        raise BadInput(
            f"{path} holds a model of the architecture {header.architecture!r}, which this version "
            f"of transformers cannot load from GGUF; it supports {supported}."
        )
    return header


_NOT_MODELS: Final = ("general", "tokenizer")


def _fields(path: Path) -> dict[str, Any]:
    """key -> value of the header, after checking that the whole file is there."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # the reader fails wherever the bytes happen to end
        raise BadInput(
            f"{path} is truncated or damaged: its GGUF header or tensors end early. "
            "Download or copy it again."
        ) from error
    size = path.stat().st_size
    if end > size:
        raise BadInput(
            f"{path} is truncated: its tensors need {end} bytes, but the file has {size}. "
            "Download or copy it again."
        )
    if end == 0:
        raise BadInput(f"{path} holds no tensors: expected the weights of a model.")
    # Token lists make up most of a header; nothing here reads them.
    scalars = {k: f for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
    return {key: item.contents() for key, item in scalars.items()}


def _header(fields: dict[str, Any]) -> GGUFHeader:
    architecture = str(fields.get("general.architecture", ""))

    def own(key: str) -> Any:
        return fields.get(f"{architecture}.{key}")

    return GGUFHeader(
        architecture=architecture,
        context_length=own("context_length"),
        key_length=own("attention.key_length"),
        rope_scaling=own("rope.scaling.type"),
        rope_factor=own("rope.scaling.factor"),
        rope_original=own("rope.scaling.original_context_length"),
        rope_magnitude=own("rope.scaling.attn_factor"),
        rope_beta_fast=own("rope.scaling.yarn_beta_fast"),
        rope_beta_slow=own("rope.scaling.yarn_beta_slow"),
    )


def repair_config(config: Any, header: GGUFHeader) -> list[str]:
    """Put into a config what transformers dropped from the header; a sentence for each repair."""
    return [*_repair_rope(config, header), *_repair_head_dim(config, header)]


def _repair_rope(config: Any, header: GGUFHeader) -> list[str]:
    rope = getattr(config, "rope_parameters", None)
    kind, factor = header.rope_scaling, header.rope_factor
    if kind not in _SCALINGS or not isinstance(rope, dict) or not factor or factor == 1.0:
        return []
    if rope.get("rope_type", "default") != "default":
        return []
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        scaling |= _yarn_options(header, config.max_position_embeddings, float(factor))
    config.rope_parameters = {**rope, **scaling}
    return [
        f"transformers drops the {kind} scaling (factor {factor:g}) that the GGUF header has; "
        "it was put back."
    ]


def _yarn_options(header: GGUFHeader, served: int, factor: float) -> dict[str, Any]:
    """The options of YaRN in transformers' words."""
    original = header.rope_original or (header.context_length or served) / factor
    options: dict[str, Any] = {"original_max_position_embeddings": int(original)}
    if header.rope_magnitude is not None:
        # GGUF's multiplies the formula, transformers' replaces it.
        formula = 0.1 * math.log(factor) + 1.0
        options["attention_factor"] = header.rope_magnitude * formula
    if header.rope_beta_fast is not None:
        options["beta_fast"] = header.rope_beta_fast
    if header.rope_beta_slow is not None:
        options["beta_slow"] = header.rope_beta_slow
    return options


def _repair_head_dim(config: Any, header: GGUFHeader) -> list[str]:
    given = header.key_length
    if given is None or getattr(config, "head_dim", given) in (given, None):
        return []
    old, config.head_dim = config.head_dim, int(given)
    return [f"transformers read head_dim {old} where the GGUF header says {given}; it was set."]
