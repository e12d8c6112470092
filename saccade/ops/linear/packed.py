"""The packed form of a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 16
# A row's eight columns of 4 bits lie in 32 bits, so that columns 2 j and 2 j + 1 are at the same
# place of the two halves: the bytes hold these columns, low nibble first.
_NIBBLES = (0, 4, 1, 5), (2, 6, 3, 7)
# The same for the upper two bits of sixteen columns of 6: what the four places of a byte hold.
_UPPERS = (0, 8, 1, 9), (2, 10, 3, 11), (4, 12, 5, 13), (6, 14, 7, 15)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix `[out, in]` in groups along `in`.

    Attributes:
        shape: (out, in).
        bits: 4 or 6 (q from 0 to 15 or 63, where there is no minimum from -8 to 7 or -32 to 31),
            or 8 (from -128 to 127).
        group: numbers of a row that share a scale: 16 or 32.
        qdata: uint8 `[blocks of 16 rows, .., 64]`, in the order that csrc/linear.h describes.
        scale: float16 `[blocks, groups, 16]`.
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
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def parts(self) -> list[Tensor]:
        """Its tensors."""
        return [self.qdata, self.scale] + ([] if self.minimum is None else [self.minimum])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.qdata.device

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on a device."""
        if self.device == torch.device(device):
            return self
        low = None if self.minimum is None else self.minimum.to(device)
        qdata, scale = self.qdata.to(device), self.scale.to(device)
        return PackedWeight(self.shape, self.bits, self.group, qdata, scale, low)


def empty(out: int, width: int, *, bits: int, group: int, with_minimum: bool) -> PackedWeight:
    """A packed weight that is to be filled."""
    blocks, groups = -(-out // BLOCK_ROWS), width // group
    qdata = torch.empty(blocks, width * bits // 32, 64, dtype=torch.uint8)
    scale = torch.empty(blocks, groups, BLOCK_ROWS, dtype=torch.float16)
    low = torch.empty_like(scale) if with_minimum else None
    return PackedWeight((out, width), bits, group, qdata, scale, low)


def pack(q: Tensor, scale: Tensor, minimum: Tensor | None, *, bits: int) -> PackedWeight:
    """The packed form of q `[out, in]`, scale and minimum `[out, groups]`.

    Args:
        q: uint8 from 0 to 15 or 63 for 4 or 6 bits (q - 8 or q - 32 is meant where minimum is
            None), int8 for 8.
    """
    out, width = q.shape
    group = width // scale.shape[1] if scale.shape[1] else 32
    if bits not in (4, 6, 8) or group not in (16, 32) or scale.shape != (out, width // group):
        raise ValueError(
            f"pack needs 4, 6 or 8 bits and a scale of every 16 or 32 numbers of a row, got {bits} "
            f"bits, numbers {list(q.shape)} and scales {list(scale.shape)}."
        )
    qdata = _bytes_in_order(_blocks_of_rows(q.view(torch.uint8)), bits)
    low = None if minimum is None else _columns_first(minimum.half())
    return PackedWeight((out, width), bits, group, qdata, _columns_first(scale.half()), low)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """q `[out, in]` as float32 with its centre taken off, scale and minimum `[out, groups]`."""
    out, width = weight.shape
    blocks = weight.qdata.shape[0]
    if weight.bits == 8:
        q = weight.qdata.view(torch.int8).view(blocks, width, BLOCK_ROWS).transpose(1, 2)
    else:
        q = _joined(weight).transpose(1, 2)
    q = q.reshape(-1, width)[:out].float()
    if weight.bits != 8 and weight.minimum is None:
        q = q - (1 << (weight.bits - 1))
    low = None if weight.minimum is None else _rows_first(weight.minimum)[:out]
    return q, _rows_first(weight.scale)[:out], low


def _joined(weight: PackedWeight) -> Tensor:
    """Numbers of 4 or 6 bits, `[blocks, runs of columns, 16, columns]`."""
    data = weight.qdata.unflatten(2, (BLOCK_ROWS, 4))
    if weight.bits == 4:
        return _columns_of(data, _NIBBLES)
    runs = data.unflatten(1, (weight.shape[1] // 16, 3))
    low = _columns_of(runs[:, :, :2], _NIBBLES).transpose(2, 3).flatten(-2)
    return low | _columns_of(runs[:, :, 2], _UPPERS) << 4


def _blocks_of_rows(x: Tensor) -> Tensor:
    """`[out, n]` -> `[blocks, 16, n]`, zeros at the end."""
    missing = -x.shape[0] % BLOCK_ROWS
    padded = torch.cat((x, x.new_zeros(missing, x.shape[1]))) if missing else x
    return padded.view(-1, BLOCK_ROWS, x.shape[1])


def _bytes_in_order(q: Tensor, bits: int) -> Tensor:
    blocks, _, width = q.shape
    if bits == 8:
        return q.transpose(1, 2).reshape(blocks, width // 4, 64)
    nibbles = _in_bytes(q & 15, _NIBBLES)
    if bits == 4:
        return nibbles
    uppers = _in_bytes(q >> 4, _UPPERS).unsqueeze(2)
    return torch.cat((nibbles.unflatten(1, (width // 16, 2)), uppers), 2).flatten(1, 2)


def _in_bytes(q: Tensor, columns: tuple[tuple[int, ...], ...]) -> Tensor:
    """Numbers `[blocks, 16, n]` side by side in bytes `[blocks, runs, 64]`; see `_columns_of`."""
    together, width = 4 * len(columns), 8 // len(columns)
    runs = q.unflatten(2, (q.shape[2] // together, together))
    parts = [runs[..., list(each)] << width * place for place, each in enumerate(columns)]
    found = parts[0]
    for part in parts[1:]:
        found = found | part
    return found.transpose(1, 2).flatten(2)


def _columns_of(data: Tensor, columns: tuple[tuple[int, ...], ...]) -> Tensor:
    """Bytes `[.., 4]` apart into the columns that their places hold, in order -> `[.., n]`."""
    width = 8 // len(columns)
    parts = [data >> width * place & ((1 << width) - 1) for place in range(len(columns))]
    order = torch.tensor([c for each in columns for c in each], device=data.device).argsort()
    return torch.cat(parts, -1).index_select(-1, order)


def _columns_first(x: Tensor) -> Tensor:
    return _blocks_of_rows(x).transpose(1, 2).contiguous()


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1])
