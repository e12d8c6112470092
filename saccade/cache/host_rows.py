"""Keys and values of one layer in host memory, in pieces that never move.

A GPU's copy engine reads page-locked host memory by itself, at the full speed of the link; pageable
memory is first copied by the processor.  Locking takes about as long as copying, so memory that
grows is locked once, piece by piece.  A row holds one token of all rows of a batch and all heads,
so that the tokens of a piece, up to any length, are one copy of keys and one of values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

SMALLEST: Final = 1 << 20
LARGEST: Final = 1 << 24
"""Bytes of a piece: as many as there are already, within these bounds.  PyTorch rounds page-locked
memory up to a power of two."""


class Piece(NamedTuple):
    """Rows `start` .. of a layer: keys `[n, B, Hkv, D]` and values `[n, B, Hkv, Dv]`."""

    start: int
    k: Tensor
    v: Tensor


class HostRows:
    """Keys and values of one layer.

    Args:
        k, v: keys `[B, Hkv, ., D]` and values `[B, Hkv, ., Dv]` of the sizes to be stored.
        dtype: storage type.
        pinned: page-locked memory, for a GPU.

    Attributes:
        shapes: (batch, heads, head_dim) of keys and of values.
        pieces: the memory, in order; nbytes: of all pieces.
        is_pageable: some memory could not be page-locked.
    """

    def __init__(self, k: Tensor, v: Tensor, dtype: torch.dtype, *, pinned: bool) -> None:
        self.shapes = tuple((*x.shape[:2], x.shape[3]) for x in (k, v))
        self.dtype, self._pinned = dtype, pinned
        self.is_pageable = False
        self.pieces: list[Piece] = []
        self.nbytes = 0
        self._row_bytes = tuple(prod(shape) * dtype.itemsize for shape in self.shapes)

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return self.pieces[-1].start + len(self.pieces[-1].k) if self.pieces else 0

    def grow(self, rows: int) -> None:
        """Memory for at least so many rows; what there is stays where it is."""
        while self.capacity < rows:
            least = max(1, sum(self._row_bytes) - 1).bit_length()
            size = max(SMALLEST, min(LARGEST, self.nbytes), 1 << least)
            memory = self._allocated(size)
            count, used = size // max(1, sum(self._row_bytes)), 0
            parts: list[Tensor] = []
            for shape, nbytes in zip(self.shapes, self._row_bytes, strict=True):
                part = memory[used : used + count * nbytes]
                parts.append(part.view(self.dtype).view(count, *shape))
                used += count * nbytes
            self.pieces.append(Piece(self.capacity, *parts))
            self.nbytes += size

    def parts(self, first: int, stop: int) -> Iterator[Piece]:
        """The memory of rows first .. stop-1, in order."""
        for start, k, v in self.pieces:
            begin, end = max(first, start), min(stop, start + len(k))
            if begin < end:
                at = slice(begin - start, end - start)
                yield Piece(begin, k[at], v[at])

    def read(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of rows first .. stop-1 as keys `[B, Hkv, n, D]` and values."""
        k, v = (self._empty(i, stop - first) for i in (0, 1))
        for part in self.parts(first, stop):
            at = slice(part.start - first, part.start - first + len(part.k))
            k[:, :, at], v[:, :, at] = part.k.permute(1, 2, 0, 3), part.v.permute(1, 2, 0, 3)
        return k, v

    def write(self, first: int, k: Tensor, v: Tensor) -> None:
        """Store keys `[B, Hkv, n, D]` and values, of any device, from row `first` on."""
        for part in self.parts(first, first + k.shape[2]):
            at = slice(part.start - first, part.start - first + len(part.k))
            part.k.copy_(k[:, :, at].permute(2, 0, 1, 3))
            part.v.copy_(v[:, :, at].permute(2, 0, 1, 3))

    def reordered(self, rows: Tensor, length: int) -> HostRows:
        """Rows of the batch chosen by int64 indices, of the first `length` tokens."""
        shapes = ((len(rows), heads, 0, dim) for _, heads, dim in self.shapes)
        k, v = (torch.empty(shape, device="meta") for shape in shapes)
        new = self if len(rows) == self.shapes[0][0] else HostRows(
            k, v, self.dtype, pinned=self._pinned
        )  # fmt: skip
        new.grow(length)
        for part in self.parts(0, length):
            new.write(part.start, *(x.index_select(1, rows).permute(1, 2, 0, 3) for x in part[1:]))
        return new

    def _empty(self, which: int, rows: int) -> Tensor:
        batch, heads, dim = self.shapes[which]
        return torch.empty(batch, heads, rows, dim, dtype=self.dtype)

    def _allocated(self, size: int) -> Tensor:
        if self._pinned and not self.is_pageable:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.is_pageable = True
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"host memory for keys could not be page-locked ({reason}): copies to the GPU "
                    "are slower and hold up the host. Raise the limit of locked memory (ulimit -l) "
                    "or free memory.",
                    stacklevel=2,
                )
        return torch.empty(size, dtype=torch.uint8)
