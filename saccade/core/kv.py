"""Views that a cache lends to an operator: what is stored where, without copying it.

An operator never asks a cache for more than this: walk the keys tile by tile (`tiles`), or hand
raw storage to a kernel that knows the layout.  Keys carry absolute positions; a position of -1
marks an empty slot, whose contents must never matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core.formats import QuantizedTensor, dequantize_keys, dequantize_values
from saccade.core.mask import KeyRange


class Span(NamedTuple):
    """`length` consecutive slots from `slot` hold the consecutive positions from `position`."""

    slot: int
    position: int
    length: int


class KVTile(NamedTuple):
    """Some keys and values, ready for arithmetic.

    Attributes:
        k: `[B, Hkv, t, D]`; v: `[B, Hkv, t, Dv]`.
        positions: int64 `[B | 1, Hkv | 1, t]`, -1 for an empty slot.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


class KVView(Protocol):
    """What every view offers.  `end` is one past the last position, counted over the batch."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(batch, kv_heads, end, head_dim, value_dim)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def hadamard(self) -> bool:
        """Keys and values are Hadamard-rotated: queries must be, and the output turned back."""
        ...

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """Tiles of at most `size` keys that cover the position ranges and little more."""
        ...


def dense(view: KVView) -> KVTile:
    """The whole view as one tile; copies unless the view is dense and unbroken."""
    end = view.shape[2]
    tiles = list(view.tiles((KeyRange(0, end),), max(end, 1)))
    if len(tiles) == 1:
        return tiles[0]
    if not tiles:
        return _empty_tile(view)
    return KVTile(
        torch.cat([t.k for t in tiles], dim=2),
        torch.cat([t.v for t in tiles], dim=2),
        torch.cat([t.positions for t in tiles], dim=-1),
    )


def _empty_tile(view: KVView) -> KVTile:
    batch, heads, _, dim, value_dim = view.shape
    k = torch.empty(batch, heads, 0, dim, dtype=view.dtype, device=view.device)
    v = torch.empty(batch, heads, 0, value_dim, dtype=view.dtype, device=view.device)
    return KVTile(k, v, torch.empty(1, 1, 0, dtype=torch.int64, device=view.device))


def _cut(ranges: Sequence[KeyRange], size: int) -> Iterator[KeyRange]:
    for start, stop in ranges:
        for begin in range(start, stop, size):
            yield KeyRange(begin, min(begin + size, stop))


def _positions(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, device=device)[None, None]  # [1, 1, t]


@dataclass(frozen=True, slots=True)
class DenseKV:
    """Contiguous slots `[B, Hkv, slots, D]` described by at most a few spans (a ring has three).

    Args:
        k: `[B, Hkv, slots, D]`; v: `[B, Hkv, slots, Dv]`; any strides with a unit last one.
        spans: ascending in position, disjoint in slots; slots in no span are empty.  Default:
            slot i holds position i.
    """

    k: Tensor
    v: Tensor
    spans: tuple[Span, ...] = ()
    hadamard: bool = False

    def __post_init__(self) -> None:
        if not self.spans:
            object.__setattr__(self, "spans", (Span(0, 0, self.k.shape[2]),))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        last = self.spans[-1]
        batch, heads, _, dim = self.k.shape
        return batch, heads, last.position + last.length, dim, self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def is_plain(self) -> bool:
        """Slot i holds position i, for all slots."""
        return self.spans == (Span(0, 0, self.k.shape[2]),)

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        for start, stop in ranges:
            for span in self.spans:
                first = max(start, span.position)
                last = min(stop, span.position + span.length)
                for cut in _cut((KeyRange(first, last),), size):
                    at, count = span.slot + cut.start - span.position, cut.stop - cut.start
                    yield KVTile(
                        self.k.narrow(2, at, count),
                        self.v.narrow(2, at, count),
                        _positions(cut.start, cut.stop, self.device),
                    )


@dataclass(frozen=True, slots=True)
class PerHeadFP8KV:
    """Dense float8_e4m3fn keys and values with one scale a row and KV head: x = code * scale.

    Args:
        codes: the view of the codes.
        k_scale, v_scale: float32 `[B, Hkv]`.
    """

    qdata: DenseKV
    k_scale: Tensor
    v_scale: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.qdata.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.qdata.dtype

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    @property
    def hadamard(self) -> bool:
        return self.qdata.hadamard

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        k_scale, v_scale = (x[..., None, None] for x in (self.k_scale, self.v_scale))
        for tile in self.qdata.tiles(ranges, size):
            yield tile._replace(k=tile.k.float() * k_scale, v=tile.v.float() * v_scale)


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """A quantised history (positions 0 .. N-1) and a full-precision recent part behind it.

    Args:
        k: Codes of `formats.quantize_keys`, scales per channel and `k_group` tokens.
        v: Codes of `formats.quantize_values`, scales per token.
        recent: newest keys and values `[B, Hkv, R, D]`, positions N .. N+R-1.
        bits_k, bits_v: 4 or 8 (whole numbers, or fp8 where the dtype of the codes says so).
        rotated: keys and values were multiplied by a Hadamard matrix before storing.
    """

    k: QuantizedTensor
    v: QuantizedTensor
    recent_k: Tensor
    recent_v: Tensor
    bits_k: int
    bits_v: int
    k_group: int
    hadamard: bool = False

    @property
    def num_packed(self) -> int:
        """Number of quantised keys, a multiple of `k_group`."""
        return self.k.qdata.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, heads, recent, dim = self.recent_k.shape
        return batch, heads, self.num_packed + recent, dim, self.recent_v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.recent_k.dtype

    @property
    def device(self) -> torch.device:
        return self.recent_k.device

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        for cut in _cut(ranges, size):
            packed = KeyRange(cut.start, min(cut.stop, self.num_packed))
            if packed.start < packed.stop:
                yield self._packed_tile(packed)
            recent = KeyRange(max(cut.start, self.num_packed), cut.stop)
            if recent.start < recent.stop:
                at, count = recent.start - self.num_packed, recent.stop - recent.start
                yield KVTile(
                    self.recent_k.narrow(2, at, count),
                    self.recent_v.narrow(2, at, count),
                    _positions(*recent, self.device),
                )

    def _packed_tile(self, keys: KeyRange) -> KVTile:
        first, last = keys.start // self.k_group, -(-keys.stop // self.k_group)
        begin, end = first * self.k_group, last * self.k_group
        grouped = QuantizedTensor(
            self.k.qdata[:, :, begin:end],
            self.k.scale[:, :, first:last],
            self.k.offset[:, :, first:last],
        )
        k = dequantize_keys(grouped, bits=self.bits_k, group=self.k_group, dtype=self.dtype)
        values = QuantizedTensor(*(part[:, :, keys.start : keys.stop] for part in self.v))
        return KVTile(
            k[:, :, keys.start - begin : keys.stop - begin],
            dequantize_values(values, bits=self.bits_v, dtype=self.dtype),
            _positions(*keys, self.device),
        )


@dataclass(frozen=True, slots=True)
class GrowingKV:
    """A quantised view during decoding steps: only the device knows how much of it is filled.

    Recent slot i holds position packed + i.  How many recent slots are filled is not said here;
    the `kv_lens` of the call say it.

    Args:
        stored: all storage, filled or not.
        packed: int64 `[1]`, keys the codes hold now.
    """

    stored: QuantizedKV
    packed: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def hadamard(self) -> bool:
        return self.stored.hadamard

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        history = self.stored.num_packed
        within = [KeyRange(first, min(last, history)) for first, last in ranges]
        for tile in self.stored.tiles(within, size):
            filled = tile.positions < self.packed
            yield tile._replace(positions=tile.positions.where(filled, -1))
        # Their positions are known to the device alone, so recent keys are visited always.
        end = self.stored.shape[2]
        for tile in self.stored.tiles((KeyRange(history, end),) if ranges else (), size):
            yield tile._replace(positions=tile.positions - history + self.packed)


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Pages of a shared pool, one table a row; position p of row b is in page table[b, p // size].

    Args:
        k: `[num_pages, Hkv, page_size, D]`; v: `[num_pages, Hkv, page_size, Dv]`.
        table: int32 `[B, max_pages]`; entries past a row's length are ignored.
        kv_lens: int32 `[B]`, keys of each row.
        end: the largest length (kept on the host so that nobody has to synchronise for it).
    """

    k: Tensor
    v: Tensor
    table: Tensor
    kv_lens: Tensor
    end: int
    hadamard: bool = field(default=False)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        _, heads, _, dim = self.k.shape
        return self.table.shape[0], heads, self.end, dim, self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        for cut in _cut(ranges, size):
            at = torch.arange(cut.start, cut.stop, device=self.device)
            stored = at[None] < self.kv_lens[:, None]  # [B, t]
            pages = self.table[:, at // self.page_size].masked_fill(~stored, 0).long()
            k = self.k[pages, :, at % self.page_size]  # [B, t, Hkv, D]
            v = self.v[pages, :, at % self.page_size]
            positions = at[None].masked_fill(~stored, -1)[:, None]  # [B, 1, t]
            yield KVTile(k.transpose(1, 2), v.transpose(1, 2), positions)


@dataclass(frozen=True, slots=True)
class RaggedKV:
    """A different number of keys for every row and KV head, in pages that belong to one head.

    Args:
        k: `[num_pages, page_size, D]`; v: `[num_pages, page_size, Dv]`.
        positions: int32 `[num_pages, page_size]`, the absolute position each slot holds.
        table: int32 `[B, Hkv, max_pages]`; kv_lens: int32 `[B, Hkv]`.
        end: one past the last position seen; max_length: the largest of kv_lens.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    table: Tensor
    kv_lens: Tensor
    end: int
    max_length: int
    hadamard: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, heads, _ = self.table.shape
        return batch, heads, self.end, self.k.shape[2], self.v.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        # Positions are arbitrary inside a head, so every slot is visited and the mask decides.
        for cut in _cut((KeyRange(0, self.max_length),) if ranges else (), size):
            at = torch.arange(cut.start, cut.stop, device=self.device)
            stored = at < self.kv_lens[..., None]  # [B, Hkv, t]
            pages = self.table[..., at // self.page_size].masked_fill(~stored, 0).long()
            slot = at % self.page_size
            positions = self.positions[pages, slot].long().masked_fill(~stored, -1)
            yield KVTile(self.k[pages, slot], self.v[pages, slot], positions)
