"""A GGUF file: its keys and tensors, every length checked against the bytes that are there.

The package `gguf` reads files that are whole; on a damaged one it loops, or fails with whatever
error the missing bytes cause.  This reader is also some times faster, because a key's value is
one Python object and not one array for each of its parts.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.hf.file_map import FileMaps

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_NUMBERS: Final = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_DIMS: Final = 4
_MOST_ELEMENTS: Final = 2**48
_AT_ONCE: Final = 2**18
"""Bytes of a file that are turned into numbers at a time."""
_PLAIN: Final = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


class Damaged(Exception):
    """What is wrong with the bytes; the caller knows which file they are in."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` in PyTorch's order, `kind` as GGML names it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    path: Path
    offset: int
    n_bytes: int
    swapped: bool

    def read(self, maps: FileMaps | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers in `dtype`; default float32, or float64 if that is what the file holds.

        A block of rows at a time, so that nothing but the result has the size of the tensor.

        Raises:
            BadInput: a kind that the installed package `gguf` cannot dequantize.
        """
        own = torch.float64 if self.kind == "F64" else torch.float32
        return self.numbers(self.raw(maps or FileMaps()), dtype or own).view(self.shape)

    def numbers(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers `[rows, width]` of rows of bytes."""
        numbers = torch.empty(len(raw), self.shape[-1], dtype=dtype)
        step = max(1, _AT_ONCE // self.row_bytes)
        for at in range(0, len(raw), step):
            numbers[at : at + step] = self._numbers(raw[at : at + step])
        return numbers

    def raw(self, maps: FileMaps) -> Tensor:
        """uint8 `[rows, bytes of a row]`, a view of the file."""
        return maps[self.path].at(self.offset, self.n_bytes).view(self._rows, self.row_bytes)

    @property
    def _rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_bytes // self._rows

    def _numbers(self, raw: Tensor) -> Tensor:
        if self.kind == "BF16" and not self.swapped:
            return raw.view(torch.bfloat16)
        if self.kind in _PLAIN:
            plain = np.dtype(_PLAIN[self.kind]).newbyteorder(">" if self.swapped else "<")
            return torch.from_numpy(raw.numpy().view(plain).astype(plain.newbyteorder("=")))
        return torch.from_numpy(self.dequantized(raw.numpy()))

    def dequantized(self, raw: np.ndarray) -> np.ndarray:
        """float32 numbers of rows of blocks.

        Raises:
            BadInput: a kind that the installed package `gguf` cannot dequantize.
        """
        import gguf

        if self.swapped:
            raise BadInput(
                f"{self.path} is big-endian and its tensor {self.name} is {self.kind}: expected "
                "F32, F16 or F64 there. Convert the file with gguf-convert-endian."
            )
        try:
            return gguf.dequantize(raw, gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise BadInput(
                f"the tensor {self.name} of {self.path} is {self.kind}, which the installed "
                "package gguf cannot turn into numbers: install a newer one."
            ) from error


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The keys (lists of text stay bytes) and the tensors of one file, or of all its shards."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])


def parse_file(path: Path) -> GGUFFile:
    """The header of one file.

    Raises:
        BadInput: not GGUF, another version, truncated or damaged.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if not magic:
            raise BadInput(f"{path} is empty. Download or copy it again.")
        if magic != _MAGIC:
            raise BadInput(
                f"{path} is not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}. "
                "Expected a .gguf file, or a folder saved by transformers."
            )
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Parser(path, data).run()
    except Damaged as error:
        raise BadInput(
            f"{path} is truncated or damaged: {error}. Download or copy it again."
        ) from error
    finally:
        data.close()


class _Parser:
    """Reads forwards from the start; `at` is the next byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.end, self.at = path, data, len(data), 4
        self.order = "<"

    def run(self) -> GGUFFile:
        self._version()
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        if n_tensors * 24 + n_keys * 13 > self.end:
            raise Damaged(f"{n_tensors} tensors and {n_keys} keys do not fit in {self.end} bytes")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in keys:
                raise Damaged(f"the key {key!r} occurs twice")
            keys[key] = self.value(key, self.number("I"))
        infos = [self._info() for _ in range(n_tensors)]
        return GGUFFile(self.path, keys, self._placed(infos, _alignment(keys)))

    def _version(self) -> None:
        version = self.number("I")
        if version and version & 0xFFFF == 0:  # the other byte order
            self.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise BadInput(
                f"{self.path} is GGUF version {version}: expected version 2 or 3. "
                "Convert the model again with a current converter."
            )

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        if self.at + size > self.end:
            raise Damaged("it ends in the middle of its header")
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += size
        return value

    def raw(self) -> bytes:
        size = self.number("Q")
        if size > self.end - self.at:
            raise Damaged("a text in its header is longer than the file")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, what: str = "a name in its header") -> str:
        try:
            return self.raw().decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"{what} is not UTF-8 text") from error

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.text(f"the value of {key}")
        if kind == _ARRAY:
            return self._array(key, self.number("I"), self.number("Q"))
        if kind not in _NUMBERS:
            raise Damaged(f"the key {key!r} has the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, key: str, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            if count * 8 > self.end - self.at:
                raise Damaged(f"the list {key!r} is longer than the file")
            return [self.raw() for _ in range(count)]
        if kind not in _NUMBERS:
            raise Damaged(f"the list {key!r} has the unknown type {kind}")
        code = f"{count}{_NUMBERS[kind]}"
        size = count * struct.calcsize(_NUMBERS[kind])
        if size > self.end - self.at:
            raise Damaged(f"the list {key!r} is longer than the file")
        self.at += size
        return list(struct.unpack_from(self.order + code, self.data, self.at - size))

    def _info(self) -> TensorInfo:
        import gguf

        name, n_dims = self.text(), self.number("I")
        if n_dims > _MOST_DIMS:
            raise Damaged(f"the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1] or (1,)
        code, offset = self.number("I"), self.number("Q")
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements <= _MOST_ELEMENTS:
            raise Damaged(f"the tensor {name!r} has the shape {shape}")
        if code not in set(gguf.GGMLQuantizationType):
            raise Damaged(
                f"the tensor {name!r} has the type {code}, which the installed package gguf does "
                "not know (a newer one may)"
            )
        kind = gguf.GGMLQuantizationType(code)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % per_block:
            raise Damaged(f"rows of {shape[-1]} numbers cannot be {kind.name} ({name!r})")
        n_bytes = elements // per_block * block_bytes
        return TensorInfo(name, shape, kind.name, self.path, offset, n_bytes, self.order == ">")

    def _placed(self, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name, with offsets in the file; they must lie one behind the other."""
        start = expected = -(-self.at // alignment) * alignment
        placed: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in placed:
                raise Damaged(f"the tensor {info.name!r} occurs twice")
            if start + info.offset != expected:
                raise Damaged(f"the tensor {info.name!r} is not where the one ahead of it ends")
            if expected + info.n_bytes > self.end:
                raise Damaged(
                    f"its tensors need {expected + info.n_bytes} bytes, but the file has {self.end}"
                )
            placed[info.name] = TensorInfo(
                info.name, info.shape, info.kind, info.path, expected, info.n_bytes, info.swapped
            )
            expected += -(-info.n_bytes // alignment) * alignment
        return placed


def _alignment(keys: dict[str, Any]) -> int:
    value = keys.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= 2**20 or value & (value - 1):
        raise Damaged(f"general.alignment is {value!r} instead of a power of two")
    return value
