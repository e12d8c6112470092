"""Blueprints straight from `config.json` or a GGUF header, without transformers.

Importing transformers takes longer than everything else that a plan does.  Only families whose
fields have one plain meaning are read here; for all others, for damaged files and for values that
cannot be the answer is None, and transformers is asked, which refuses what has to be refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from saccade.rope import parse
from saccade.runtime.model import ModelFacts
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.positions import Positions
from saccade.runtime.weights import Matrix, grouped

_FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Norm, attention, norm, gated MLP."""
_SIZES: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_NOT_PLAIN: Final = (
    "quantization_config",
    "auto_map",
    "text_config",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
_THETA: Final = 10000.0
_DTYPES: Final = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_NUMBERS: Final[dict[int, str]] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9
_MOST: Final = 1 << 40
_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
_KINDS: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
"""GGML's numbers of types -> their names."""


def blueprint_of(
    path: Path, dtype: torch.dtype | None, gguf_dtype: torch.dtype
) -> Blueprint | None:
    """The blueprint of a transformers folder or a GGUF file; None where it takes more to know.

    Args:
        dtype: of the weights; None: what a config says, `gguf_dtype` for GGUF.
    """
    try:
        if path.is_dir():
            values = json.loads((path / "config.json").read_bytes())
            return from_config(values, path.name, dtype)
        return from_gguf(path, dtype or gguf_dtype)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def from_config(values: dict[str, Any], name: str, dtype: torch.dtype | None) -> Blueprint | None:
    """The blueprint of what a config.json holds."""
    family = values.get("model_type")
    if family not in _FAMILIES or any(values.get(key) for key in _NOT_PLAIN):
        return None
    sizes = [values[key] for key in _SIZES]
    said = values.get("dtype") or values.get("torch_dtype") or "float32"
    windows = _windows(values, family)
    head_dim = values["head_dim"] if family == "qwen3" else values.get("head_dim")
    if windows is None or said not in _DTYPES or not _are_sizes(*sizes):
        return None
    vocab, hidden, inner, layers, heads, kv_heads, length = sizes
    head_dim = hidden // heads if head_dim is None else head_dim
    tied = values.get("tie_word_embeddings", False)
    if not _are_sizes(head_dim) or type(tied) is not bool:
        return None
    queries, keys = heads * head_dim, kv_heads * head_dim
    bias = bool(values.get("attention_bias", False))
    layer = hidden * (2 * queries + 2 * keys + 3 * inner + 2)  # products and two norms
    layer += (queries + 2 * keys) * (bias or family == "qwen2")
    layer += hidden * (bias and family != "qwen2")
    layer += (2 * inner + hidden) * bool(values.get("mlp_bias", False))
    layer += 2 * head_dim * (family == "qwen3")
    facts = ModelFacts(
        name=name, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocab, n_ctx_train=length, dtype=dtype or _DTYPES[said],
        windows=windows, positions=_positions(values, length),
    )  # fmt: skip
    weights = layers * layer + hidden + vocab * hidden * (1 if tied else 2)
    kind = "F32"  # of a folder, whose weights are plain unless they are rounded
    every = ((queries, hidden, 1), (keys, hidden, 2), (hidden, queries, 1), (inner, hidden, 2),
             (hidden, inner, 1))  # fmt: skip
    matrices = [Matrix(kind, rows, width, count * layers) for rows, width, count in every]
    matrices += _ends(tied, kind, kind, vocab, hidden)
    return Blueprint(facts=facts, weights=weights, hidden=hidden, inner=inner, tied=tied,
                     matrices=grouped(matrices))  # fmt: skip


def _ends(tied: bool, embedding: str, output: str, vocab: int, hidden: int) -> list[Matrix]:
    """The embedding and the output matrix, of these kinds; one matrix where they are tied."""
    looked_up = Matrix(embedding, vocab, hidden, is_head=tied, is_read=False)
    return [looked_up] if tied else [looked_up, Matrix(output, vocab, hidden, is_head=True)]


def _positions(values: dict[str, Any], trained: int) -> Positions:
    """How it rotates, under the names that old and new configs have for it."""
    given = {**(values.get("rope_parameters") or values.get("rope_scaling") or {})}
    given["rope_type"] = given.get("rope_type") or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or _THETA)
    rope = parse(given, max_position_embeddings=trained, rope_theta=theta, only_known=True)
    return Positions(rule=rope.rule, base=rope.base)


def _are_sizes(*sizes: object) -> bool:
    return all(type(size) is int and 0 < size < _MOST for size in sizes)


def _windows(values: dict[str, Any], family: str) -> tuple[int | None, ...] | None:
    """The window of each layer; None where the config leaves it to transformers."""
    layers = values["num_hidden_layers"]
    if not _are_sizes(layers) or layers > 10_000:
        return None
    types = values.get("layer_types")
    if family == "llama":
        return None if types or values.get("sliding_window") else (None,) * layers
    window = values["sliding_window"] if family == "mistral" else values.get("sliding_window")
    if types is not None:
        known = {"full_attention": None, "sliding_attention": window}
        return tuple(known[kind] for kind in types) if len(types) == layers else None
    if family == "mistral":
        return (window,) * layers
    return None if values.get("use_sliding_window") else (None,) * layers


def from_gguf(path: Path, dtype: torch.dtype) -> Blueprint | None:
    """The blueprint that the header of a GGUF file gives."""
    with path.open("rb") as file:
        keys, tensors = _Header(file.read(min(path.stat().st_size, 64 << 20))).read()
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    family = keys.get("general.architecture")
    if family not in _ARCHITECTURES or keys.get("general.type", "model") != "model":
        return None
    if keys.get("split.count", 1) != 1:
        return None

    def size(key: str, default: int | None = None) -> int:
        return keys[f"{family}.{key}"] if default is None else keys.get(f"{family}.{key}", default)

    if size("expert_count", 0) or size("attention.sliding_window", 0):
        return None
    if "rope_freqs.weight" in shapes or keys.get(f"{family}.rope.scaling.type", "none") != "none":
        return None
    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // heads)
    facts = ModelFacts(
        name=path.stem, num_layers=size("block_count"), num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads), head_dim=head_dim,
        vocab_size=shapes["token_embd.weight"][0], n_ctx_train=size("context_length"), dtype=dtype,
        windows=(None,) * size("block_count"),
        positions=Positions(base=float(keys.get(f"{family}.rope.freq_base", _THETA))),
    )  # fmt: skip
    inner = size("feed_forward_length")
    if not _are_sizes(hidden, inner, facts.num_layers, heads, facts.num_kv_heads, head_dim):
        return None
    if size("attention.value_length", head_dim) != head_dim or facts.n_ctx_train < 1:
        return None
    weights = sum(math.prod(shape) for shape in shapes.values())
    tied = "output.weight" not in shapes
    return Blueprint(facts=facts, weights=weights, hidden=hidden, inner=inner, tied=tied,
                     matrices=grouped(_matrices(tensors, tied)))  # fmt: skip


def _matrices(tensors: dict[str, tuple[tuple[int, ...], str]], tied: bool) -> Iterator[Matrix]:
    """Every tensor with two dimensions: in these families all are linear layers or embeddings."""
    for name, (shape, kind) in tensors.items():
        if len(shape) == 2:
            looked_up, head = name == "token_embd.weight", name == "output.weight"
            is_head = head or (looked_up and tied)
            yield Matrix(kind, *shape, is_head=is_head, is_read=not looked_up)


class _Header:
    """Walks a GGUF header; lists are passed over, so that a vocabulary costs little."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
        """(keys that are no lists, shape in PyTorch's order and kind of each tensor)."""
        magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", self.data, 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("not a GGUF file of a known version")
        self.at = 24
        keys = dict(self._key() for _ in range(n_keys))
        return keys, dict(self._tensor() for _ in range(n_tensors))

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _text(self) -> str:
        size = self._number("Q")
        self.at += size
        if self.at > len(self.data):
            raise ValueError("the header does not end")
        return self.data[self.at - size : self.at].decode()

    def _key(self) -> tuple[str, Any]:
        name, kind = self._text(), self._number("I")
        if kind == _STRING:
            return name, self._text()
        if kind == _ARRAY:
            return name, self._pass_list(self._number("I"), self._number("Q"))
        return name, self._number(_NUMBERS[kind])

    def _pass_list(self, kind: int, count: int) -> None:
        if kind != _STRING:
            self.at += count * struct.calcsize("<" + _NUMBERS[kind])
            return
        length, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self.at = at

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], str]]:
        name, dims = self._text(), self._number("I")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        kind, _ = self._number("I"), self._number("Q")  # its type, and where it lies
        return name, (shape, _KINDS.get(kind, f"type {kind}"))
