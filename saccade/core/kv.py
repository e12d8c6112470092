"""Views of a cache that operators read: what is stored where, without copying it.

A backend either walks the keys tile by tile (`tiles`), or passes the raw storage to a kernel that
supports the layout.  Keys carry absolute positions; a position of -1 marks an empty slot, whose
contents must never change a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core.check import (
    LARGEST_POSITION,
    LAYOUT,
    STORED,
    check_device,
    check_exactly,
    check_kv,
    check_tensor,
    integer,
)
from saccade.core.formats import FP8
from saccade.core.mask import KeyRange


class Span(NamedTuple):
    """`length` consecutive slots from `slot` hold the consecutive positions from `position`."""

    slot: int
    position: int
    length: int


class KVTile(NamedTuple):
    """Some keys and values in a floating-point dtype.

    Attributes:
        k: `[B, Hkv, t, D]`; v: `[B, Hkv, t, Dv]`.
        positions: int64 `[B | 1, Hkv | 1, t]`, -1 for an empty slot.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


class KVView(Protocol):
    """What every view offers to backends.  `end` is one past the last position over the batch."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(batch, kv_heads, end, head_dim, value_dim)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that `tiles` yields."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the storage lies."""
        ...

    @property
    def hadamard(self) -> bool:
        """Whether k and v were stored after `hadamard_transform`; q and the output need it too."""
        ...

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The tensors that a gradient could flow to."""
        ...

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """Tiles of at most `size` keys that cover the position ranges and little more.

        Args:
            ranges: half-open ranges of absolute positions, ascending and disjoint.
            size: most keys of a tile.
        """
        ...


def dense(view: KVView) -> KVTile:
    """The whole view as one tile; a copy unless the view is dense with one span."""
    end = view.shape[2]
    tiles = list(view.tiles((KeyRange(0, end),), max(end, 1)))
    return joined(tiles) if tiles else _empty_tile(view)


def joined(tiles: Sequence[KVTile]) -> KVTile:
    """Tiles one after the other as one; a copy unless there is only one."""
    if len(tiles) == 1:
        return tiles[0]
    return KVTile(
        torch.cat([tile.k for tile in tiles], dim=2),
        torch.cat([tile.v for tile in tiles], dim=2),
        torch.cat([tile.positions for tile in tiles], dim=-1),
    )


def _empty_tile(view: KVView) -> KVTile:
    batch, heads, _, *dims = view.shape
    k, v = (torch.empty(batch, heads, 0, n, dtype=view.dtype, device=view.device) for n in dims)
    return KVTile(k, v, consecutive(0, 0, view.device))


def split_ranges(ranges: Sequence[KeyRange], size: int) -> Iterator[KeyRange]:
    """The ranges in order, cut into ranges of at most `size` keys."""
    for start, stop in ranges:
        for begin in range(start, stop, size):
            yield KeyRange(begin, min(begin + size, stop))


def consecutive(start: int, stop: int, device: torch.device) -> Tensor:
    """Positions start .. stop-1 of a tile, int64 `[1, 1, t]`."""
    return torch.arange(start, stop, device=device)[None, None]


def check_storage(k: object, v: object, axes: str, shared: int, what: str) -> None:
    """Raise TypeError or ValueError unless k and v are floating-point storage that fits."""
    keys = check_tensor("k", k, STORED, axes)
    values = check_tensor("v", v, STORED, axes)
    check_device("v", values, keys.device)
    check_kv(keys, values, shared, what)


class TensorView:
    """dtype and device of a view whose keys and values are the tensors `k` and `v`."""

    __slots__ = ()
    k: Tensor
    v: Tensor

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """See KVView."""
        return self.k, self.v

    @property
    def dtype(self) -> torch.dtype:
        """See KVView."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """See KVView."""
        return self.k.device


@dataclass(frozen=True, slots=True)
class DenseKV(TensorView):
    """Contiguous slots `[B, Hkv, slots, D]` described by at most a few spans (a ring has three).

    Args:
        k: `[B, Hkv, slots, D]`; v: `[B, Hkv, slots, Dv]`; any strides.
        spans: ascending in position, disjoint in slots; slots in no span are empty.  Default:
            slot i holds position i.

    Raises:
        TypeError, ValueError: tensors that do not fit together, or spans outside of the slots.
    """

    k: Tensor
    v: Tensor
    spans: tuple[Span, ...] = ()
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_storage(self.k, self.v, LAYOUT, 3, "batch, heads and length")
        if not self.spans:
            object.__setattr__(self, "spans", (Span(0, 0, self.k.shape[2]),))
        else:
            most = None if self.k.is_meta else LARGEST_POSITION  # plans go further
            _check_spans(self.spans, self.k.shape[2], most)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        last = self.spans[-1]
        batch, heads, _, dim = self.k.shape
        return batch, heads, last.position + last.length, dim, self.v.shape[3]

    @property
    def is_plain(self) -> bool:
        """Slot i holds position i, for all slots."""
        return self.spans == (Span(0, 0, self.k.shape[2]),)

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        for start, stop in ranges:
            for span in self.spans:
                first = max(start, span.position)
                last = min(stop, span.position + span.length)
                for keys in split_ranges((KeyRange(first, last),), size):
                    at, count = span.slot + keys.start - span.position, keys.stop - keys.start
                    yield KVTile(
                        self.k.narrow(2, at, count),
                        self.v.narrow(2, at, count),
                        consecutive(keys.start, keys.stop, self.device),
                    )


def _check_spans(spans: Sequence[Span], slots: int, most: int | None) -> None:
    """Raise unless spans lie within the slots, apart from each other, and ascend in position."""
    end, taken = 0, 0
    for span in sorted(spans):
        slot, _, length = (integer("a span's number", n, 0, most) for n in span)
        if slot + length > slots or (length and slot < taken):
            raise ValueError(
                f"spans must be apart from each other in the {slots} slots, got {list(spans)}."
            )
        taken = max(taken, slot + length)
    for _, position, length in spans:
        if position < end:
            raise ValueError(f"spans must ascend in position, got {list(spans)}.")
        end = position + length


@dataclass(frozen=True, slots=True)
class PerHeadFP8KV:
    """Dense float8_e4m3fn keys and values with one scale a row and KV head: x = qdata * scale.

    Args:
        qdata: dense view of the float8_e4m3fn storage.
        k_scale, v_scale: float32 `[B, Hkv]`.

    Raises:
        TypeError, ValueError: other dtypes or shapes.
    """

    qdata: DenseKV
    k_scale: Tensor
    v_scale: Tensor

    def __post_init__(self) -> None:
        qdata = self.qdata
        if not isinstance(qdata, DenseKV):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"PerHeadFP8KV.qdata must be a DenseKV, got {type(qdata).__name__}.")
        if qdata.k.dtype != FP8 or qdata.v.dtype != FP8:
            raise TypeError(
                "PerHeadFP8KV.qdata must hold float8_e4m3fn keys and values, got "
                f"{qdata.k.dtype} and {qdata.v.dtype}. Use saccade.quantize_fp8_per_head."
            )
        shape = tuple(qdata.k.shape[:2])
        for name in ("k_scale", "v_scale"):
            check_exactly(name, getattr(self, name), (torch.float32,), shape, qdata.device)

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """See KVView."""
        return *self.qdata.floats, self.k_scale, self.v_scale

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        return self.qdata.shape

    @property
    def dtype(self) -> torch.dtype:
        """See KVView."""
        return self.qdata.dtype

    @property
    def device(self) -> torch.device:
        """See KVView."""
        return self.qdata.device

    @property
    def hadamard(self) -> bool:
        """See KVView."""
        return self.qdata.hadamard

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        k_scale, v_scale = (x[..., None, None] for x in (self.k_scale, self.v_scale))
        for tile in self.qdata.tiles(ranges, size):
            yield tile._replace(k=tile.k.float() * k_scale, v=tile.v.float() * v_scale)
