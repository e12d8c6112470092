"""The header of a safetensors file: which tensor lies where, and the metadata.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LONGEST: Final = 100_000_000
"""Bytes of a header, the limit of safetensors itself."""
_NAMED: Final = {name: dtype for dtype, name in DTYPES.items()}


class TensorPlace(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype, shape: of the tensor.
        start, stop: its bytes, counted from the beginning of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def encoded(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON header, and the header."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def parsed(file: int) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """Tensors and metadata of an open file (its descriptor).

    Raises:
        ValueError: no safetensors file, or one whose tensors do not fill it exactly.
    """
    size = os.fstat(file).st_size
    head = os.read(file, 8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > _LONGEST or 8 + length > size:
        raise ValueError(f"its header does not fit into its {size} bytes")
    text = _read(file, length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is no table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    return _places(entries, start=8 + length, size=size), metadata


def _places(entries: dict[str, Any], *, start: int, size: int) -> dict[str, TensorPlace]:
    """Where the tensors are; together they have to fill the file."""
    found: dict[str, TensorPlace] = {}
    at = start
    for name, entry in entries.items():
        found[name] = place = _place(name, entry, start)
        if place.start != at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at = place.stop
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")
    return found


def _place(name: str, entry: Any, start: int) -> TensorPlace:
    wrong = ValueError(f"{name} has no dtype, shape and offsets that fit together")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NAMED:
        raise wrong
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise wrong
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, *offsets)):
        raise wrong
    if math.prod(shape) * _NAMED[dtype].itemsize != offsets[1] - offsets[0]:
        raise wrong
    return TensorPlace(_NAMED[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has two entries of one name")
    return found


def _read(file: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count and (part := os.read(file, min(count, 1 << 24))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
