"""How many bytes a weight takes in memory under each choice of `load_model(weights=)`.

A matrix whose kind has a packed form stays in it (`ops.linear`); the tests compare these sizes
with what packing really makes.  So a plan knows the bytes from the header of a file alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from saccade.core import BadInput
from saccade.ops.linear.packed import BLOCK_ROWS

_GOES_WITH: Final = {"f32": (torch.float32, torch.float64), "bf16": (torch.bfloat16,)}
_ACTIVATIONS: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What packed weights are multiplied by.  float32 is the default on a CPU: products round it to
bfloat16 either way, but sums and norms that are rounded too move a model's answers much farther."""


@dataclass(frozen=True, slots=True)
class Form:
    """A packed form, as a `PackedWeight` has it: bits and group, with a minimum or without."""

    bits: int
    group: int
    minimum: bool

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}"

    def n_bytes(self, rows: int, width: int) -> int:
        """Bytes of a matrix `[rows, width]`."""
        rows = -(-rows // BLOCK_ROWS) * BLOCK_ROWS  # the last ones are filled up
        return rows * (width * self.bits // 8 + width // self.group * 2 * (1 + self.minimum))


BLOCKS: Final[Mapping[str, Form]] = {
    "Q4_0": Form(4, 32, False),
    "Q4_1": Form(4, 32, True),
    "Q4_K": Form(4, 32, True),
    "Q5_0": Form(6, 32, False),
    "Q5_1": Form(6, 32, True),
    "Q5_K": Form(6, 32, True),
    "Q6_K": Form(6, 16, False),
    "Q8_0": Form(8, 32, False),
}
"""Kinds of GGUF's blocks that have a packed form."""
ROUNDED: Final[Mapping[str, Form]] = {"int8": Form(8, 32, False), "int4": Form(4, 32, True)}
Stored = Form | torch.dtype
"""How a matrix lies in memory."""


def held_as(
    weights: str, dtype: torch.dtype | None, device: str, *, is_folder: bool
) -> tuple[str, torch.dtype | None]:
    """(what `stored_as` takes, dtype of activations; None: the folder's) under a choice of weights.

    Args:
        weights: "file", "int8", "int4", "bf16" or "f32", as `load_model` takes it.
        dtype: what was asked for; device: "cpu" or "cuda".

    Raises:
        BadInput: a form that excludes the dtype.
    """
    if weights == "file" and (is_folder or device != "cpu"):
        return "plain", dtype or (None if is_folder else torch.bfloat16)
    allowed = _GOES_WITH.get(weights, _ACTIVATIONS)
    if dtype is not None and dtype not in allowed:
        names = " or ".join(f"dtype={each}" for each in allowed)
        raise BadInput(
            f"weights={weights!r} goes with {names}, got dtype={dtype}: leave dtype out, or "
            'use weights="f32" for more digits and weights="bf16" for fewer.'
        )
    if weights in _GOES_WITH:
        return "plain", dtype or allowed[0]
    return weights, dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


def stored_as(kind: str, width: int, held: str, dtype: torch.dtype, *, outer: bool) -> Stored:
    """How a matrix of a linear layer or an embedding lies in memory: packed, or as plain numbers.

    Args:
        kind: GGML's name for what the file holds.
        width: numbers of a row; rows that are not whole groups are not packed.
        held: "plain", "file" (a GGUF's own blocks), "int8" or "int4".
        dtype: of activations.
        outer: whether it is the embedding or the output matrix, which get 8 bits at least.
    """
    if held == "plain":
        return dtype
    form = BLOCKS.get(kind) if held == "file" else ROUNDED["int8" if outer else held]
    if form is not None and width % form.group == 0:
        return form
    halved = held == "file" and dtype == torch.float32 and kind not in ("F32", "F64")
    return (torch.bfloat16 if kind == "BF16" else torch.float16) if halved else dtype


@dataclass(frozen=True, slots=True, order=True)
class Matrix:
    """`count` matrices `[rows, width]` of linear layers or embeddings, of a kind of the file.

    Attributes:
        is_head: whether it is the output matrix, which is read once for each chosen token.
        is_read: whether each token of a prompt is multiplied by it; an embedding is looked up.
    """

    kind: str
    rows: int
    width: int
    count: int = 1
    is_head: bool = False
    is_read: bool = True

    @property
    def numbers(self) -> int:
        """Numbers in all of them."""
        return self.count * self.rows * self.width

    def stored(self, held: str, dtype: torch.dtype) -> Stored:
        """How each of them lies in memory; see `stored_as`."""
        outer = self.is_head or not self.is_read
        return stored_as(self.kind, self.width, held, dtype, outer=outer)

    def n_bytes(self, held: str, dtype: torch.dtype) -> int:
        """Bytes of all of them in memory."""
        stored = self.stored(held, dtype)
        if isinstance(stored, torch.dtype):
            return self.numbers * stored.itemsize
        return self.count * stored.n_bytes(self.rows, self.width)


def grouped(matrices: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The same matrices, those that are alike counted together, in one order."""
    found: Counter[Matrix] = Counter()
    for each in matrices:
        found[replace(each, count=1)] += each.count
    return tuple(sorted(replace(each, count=count) for each, count in found.items()))
