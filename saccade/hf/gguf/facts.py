"""The facts of a GGUF file, which remember which of them were used."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import numpy as np

from saccade.core import BadInput
from saccade.hf.gguf.file import GGUFFile
from saccade.hf.tensor_files import named

_LARGEST: Final = 2**31 - 1
_REQUIRED: Final = object()
_IRRELEVANT: Final = re.compile(
    r"general\..*|tokenizer\..*|split\..*|quantize\..*|[^.]+\.rope\.scaling\.finetuned"
)
"""Keys that do not change what the model computes; the tokenizer's are used elsewhere."""


class Facts:
    """The keys and tensors of one file.  What is asked for counts as used.

    Keys are named without the architecture in front.  A list that says the same of every layer
    is that value.
    """

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self.prefix = file, prefix
        self.used_tensors: set[str] = set()
        self.notes: list[str] = []
        self._used_keys: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it is, None if there is none."""
        key = f"{self.prefix}.{name}"
        self._used_keys.add(key)
        return self.file.keys.get(key)

    def _typed(self, name: str, default: Any, fits: Any, expected: str) -> Any:
        value = self.get(name)
        if value is None:
            if default is _REQUIRED:
                raise BadInput(
                    f"{self.file.path} has no {self.prefix}.{name}: expected {expected}. "
                    "Convert the model again."
                )
            return default
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if not fits(value):
            raise self.wrong(name, expected, value)
        return value

    def wrong(self, name: str, expected: str, value: Any) -> BadInput:
        """The error for a key whose value cannot be."""
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:76] + " ..."
        return BadInput(
            f"{self.file.path} has {self.prefix}.{name} = {shown}: expected {expected}."
        )

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """A whole number of at least `least`."""
        return self._typed(
            name,
            default,
            lambda value: type(value) is int and least <= value <= _LARGEST,
            f"a whole number from {least} to {_LARGEST}",
        )

    def real(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive number, as it was written before it was rounded to float32."""
        value = self._typed(
            name,
            default,
            lambda value: type(value) in (int, float) and 0 < value < math.inf,
            "a positive number",
        )
        return value if value is default else _unrounded(float(value))

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or False."""
        return self._typed(name, default, lambda value: type(value) is bool, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A text."""
        return self._typed(name, default, lambda value: type(value) is str, "a text")

    def must_be(self, name: str, wanted: Any, why: str) -> None:
        """Refuse another value than `wanted`; a missing one is fine."""
        value = self._typed(name, wanted, lambda _: True, "")
        same = value == wanted
        if type(value) is float and type(wanted) is float:
            same = math.isclose(value, wanted, rel_tol=1e-5)
        if not same:
            raise self.wrong(name, f"{wanted} ({why})", value)

    def numbers(self, tensor: str) -> list[float] | None:
        """A small tensor that stands beside the weights, None if there is none."""
        info = self.file.tensors.get(tensor)
        if info is None:
            return None
        self.used_tensors.add(tensor)
        return [float(x) for x in info.read().flatten()]

    def any_tensor(self, pattern: str) -> bool:
        """Whether a tensor's whole name matches; `*` stands for the number of the layer."""
        return any(_exact(pattern).fullmatch(name) for name in self.file.tensors)

    def shape(self, pattern: str, dims: int = 2) -> tuple[int, ...]:
        """The shape of a tensor that must be there (of the first whose name matches).

        Raises:
            BadInput: it is missing, or has another number of dimensions.
        """
        exact = _exact(pattern)
        found = (info for name, info in self.file.tensors.items() if exact.fullmatch(name))
        info = next(found, None)
        if info is None:
            raise missing(self.file, [pattern])
        if len(info.shape) != dims:
            raise BadInput(
                f"{self.file.path} gives {info.name} the shape {info.shape}: expected {dims} "
                "dimensions. Download or convert it again."
            )
        return info.shape

    def layers_with(self, pattern: str) -> set[int]:
        """Numbers of the layers that have such a tensor; `*` stands for the number."""
        exact = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
        found = (exact.fullmatch(name) for name in self.file.tensors)
        return {int(match[1]) for match in found if match}

    def unused_keys(self) -> list[str]:
        """The keys that nothing asked for and that may matter."""
        return [
            key
            for key in self.file.keys
            if key not in self._used_keys and not _IRRELEVANT.fullmatch(key)
        ]


def _exact(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+"))


def _unrounded(value: float) -> float:
    """The shortest number that float32 rounds to `value`: 1e-06 for 9.999999974752427e-07."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def missing(file: GGUFFile, names: list[str]) -> BadInput:
    """The error for tensors that the model needs and the file lacks."""
    return BadInput(
        f"{file.path} lacks {len(names)} of the model's tensors: {named(names)}. "
        "The file is incomplete, or of a newer kind: download or convert it again."
    )
