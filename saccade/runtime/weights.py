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

WEIGHTS: Final = ("file", "int8", "int4", "bf16", "f32")
"""As the file has them, rounded to 8 or 4 bits, or plain numbers."""
PLAIN: Final[Mapping[str, torch.dtype]] = {"bf16": torch.bfloat16, "f32": torch.float32}
"""Choices that leave plain numbers."""
ROWS_TOGETHER: Final = 16
"""Rows of a packed matrix that lie together; the last ones are filled up."""


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
        rows = -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER
        return rows * (width * self.bits // 8 + width // self.group * 2 * (1 + self.minimum))


BLOCKS: Final[Mapping[str, Form]] = {
    "Q4_0": Form(4, 32, False),
    "Q4_1": Form(4, 32, True),
    "Q4_K": Form(4, 32, True),
    "Q5_0": Form(8, 32, False),
    "Q5_1": Form(8, 32, True),
    "Q5_K": Form(8, 32, True),
    "Q6_K": Form(8, 16, False),
    "Q8_0": Form(8, 32, False),
}
"""Kinds of GGUF's blocks that have a packed form."""
ROUNDED: Final[Mapping[str, Form]] = {"int8": Form(8, 32, False), "int4": Form(4, 32, True)}


HALVES: Final[Mapping[str, torch.dtype]] = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds of two bytes, which stay what they are under activations of four."""
Stored = Form | torch.dtype


def stored_as(kind: str, width: int, weights: str, dtype: torch.dtype) -> Stored:
    """How a matrix of a linear layer or an embedding lies in memory: packed, or as plain numbers.

    Args:
        kind: of the file: one of GGML's, or of a dtype, "BF16".
        width: numbers of a row; rows that are not whole groups are not packed.
        weights: one of WEIGHTS.
        dtype: of activations.
    """
    if weights in PLAIN:
        return PLAIN[weights]
    form = BLOCKS.get(kind) if weights == "file" else ROUNDED[weights]
    if form is not None and width % form.group == 0:
        return form
    return HALVES.get(kind, dtype) if weights == "file" else dtype


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

    def n_bytes(self, weights: str, dtype: torch.dtype) -> int:
        """Bytes of all of them in memory; plain ones are of `dtype`."""
        stored = stored_as(self.kind, self.width, weights, dtype)
        if isinstance(stored, torch.dtype):
            return self.numbers * stored.itemsize
        return self.count * stored.n_bytes(self.rows, self.width)


def grouped(matrices: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The same matrices, those that are alike counted together, in one order."""
    found: Counter[Matrix] = Counter()
    for each in matrices:
        found[replace(each, count=1)] += each.count
    return tuple(sorted(replace(each, count=count) for each, count in found.items()))
