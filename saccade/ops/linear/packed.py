"""The packed form of a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix `[out, in]` in groups along `in`.

    Attributes:
        shape: (out, in).
        bits: 4 (q from 0 to 15, or from -8 to 7 where there is no minimum) or 8 (from -128 to 127).
        group: numbers of a row that share a scale: 16 or 32.
        qdata: uint8, in the order that the kernels read.
        scale: float16, in the order that the kernels read.
        minimum: as scale; None where every minimum is 0.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    qdata: Tensor
    scale: Tensor
    minimum: Tensor | None

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        parts = [self.qdata, self.scale] + ([] if self.minimum is None else [self.minimum])
        return sum(part.numel() * part.element_size() for part in parts)


def pack(q: Tensor, scale: Tensor, minimum: Tensor | None, *, bits: int) -> PackedWeight:
    """The packed form of q `[out, in]`, scale and minimum `[out, groups]`.

    Args:
        q: uint8 from 0 to 15 for 4 bits (q - 8 is meant where minimum is None), int8 for 8.
    """
    out, width = q.shape
    group = width // scale.shape[1]
    qdata = q[:, ::2] | (q[:, 1::2] << 4) if bits == 4 else q.view(torch.uint8)
    low = None if minimum is None else minimum.half()
    return PackedWeight((out, width), bits, group, qdata.contiguous(), scale.half(), low)
