"""Views of a cache that operators read: what is stored where, without copying it.

A backend either walks the keys tile by tile (`tiles`), or passes the raw storage to a kernel that
knows the layout.  Keys carry absolute positions; a position of -1 marks an empty slot, whose
contents must never change a result.
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
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def hadamard(self) -> bool:
        """Whether k and v were stored after `hadamard_transform`; q and the output need it too."""
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
    batch, heads, _, *dims = view.shape
    k, v = (torch.empty(batch, heads, 0, n, dtype=view.dtype, device=view.device) for n in dims)
    return KVTile(k, v, _positions(0, 0, view.device))


def _chunks_of(ranges: Sequence[KeyRange], size: int) -> Iterator[KeyRange]:
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
                for keys in _chunks_of((KeyRange(first, last),), size):
                    at, count = span.slot + keys.start - span.position, keys.stop - keys.start
                    yield KVTile(
                        self.k.narrow(2, at, count),
                        self.v.narrow(2, at, count),
                        _positions(keys.start, keys.stop, self.device),
                    )


@dataclass(frozen=True, slots=True)
class PerHeadFP8KV:
    """Dense float8_e4m3fn keys and values with one scale a row and KV head: x = qdata * scale.

    Args:
        qdata: dense view of the float8_e4m3fn storage.
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
        k: of `formats.quantize_keys`, scales per channel and `k_group` tokens.
        v: of `formats.quantize_values`, scales per token.
        recent_k, recent_v: newest keys and values `[B, Hkv, R, D]`, positions N .. N+R-1.
        bits_k, bits_v: 4 or 8 (integers, or fp8 where `qdata` is float8_e4m3fn).
        k_group: tokens that share a key scale.
        hadamard: keys and values were stored after `hadamard_transform`.
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
    def num_quantized(self) -> int:
        """Number of quantised keys, a multiple of `k_group`."""
        return self.k.qdata.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, heads, recent, dim = self.recent_k.shape
        return batch, heads, self.num_quantized + recent, dim, self.recent_v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.recent_k.dtype

    @property
    def device(self) -> torch.device:
        return self.recent_k.device

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        for keys in _chunks_of(ranges, size):
            quantized = KeyRange(keys.start, min(keys.stop, self.num_quantized))
            if quantized.start < quantized.stop:
                yield self._quantized_tile(quantized)
            recent = KeyRange(max(keys.start, self.num_quantized), keys.stop)
            if recent.start < recent.stop:
                at, count = recent.start - self.num_quantized, recent.stop - recent.start
                yield KVTile(
                    self.recent_k.narrow(2, at, count),
                    self.recent_v.narrow(2, at, count),
                    _positions(*recent, self.device),
                )

    def _quantized_tile(self, keys: KeyRange) -> KVTile:
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
    """A quantised view in a captured decoding step, where how much is filled is a device tensor.

    Recent slot i holds position num_quantized + i.  How many recent slots are filled is in the
    `kv_lens` of the call.

    Args:
        stored: all storage, filled or not.
        num_quantized: int64 `[1]`, quantised keys that are filled.
    """

    stored: QuantizedKV
    num_quantized: Tensor

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
        history = self.stored.num_quantized
        within = [KeyRange(first, min(last, history)) for first, last in ranges]
        for tile in self.stored.tiles(within, size):
            filled = tile.positions < self.num_quantized
            yield tile._replace(positions=tile.positions.where(filled, -1))
        # The host does not know the positions of recent keys, so all of them are read.
        end = self.stored.shape[2]
        for tile in self.stored.tiles((KeyRange(history, end),) if ranges else (), size):
            yield tile._replace(positions=tile.positions - history + self.num_quantized)


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Pages of a shared pool (PagedAttention, arXiv 2309.06180).

    Position p of row b lies in page `page_table[b, p // page_size]`, slot `p % page_size`.

    Args:
        k: `[num_pages, Hkv, page_size, D]`; v: `[num_pages, Hkv, page_size, Dv]`.
        page_table: int32 `[B, max_pages]`; entries past a row's length are ignored.
        kv_lens: int32 `[B]`, keys of each row.
        end: the largest of kv_lens, on the host, so that reading it needs no synchronisation.
        hadamard: see KVView.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    hadamard: bool = field(default=False)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        _, heads, _, dim = self.k.shape
        return self.page_table.shape[0], heads, self.end, dim, self.v.shape[3]

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
        for keys in _chunks_of(ranges, size):
            at = torch.arange(keys.start, keys.stop, device=self.device)
            stored = at[None] < self.kv_lens[:, None]  # [B, t]
            pages = self.page_table[:, at // self.page_size].masked_fill(~stored, 0).long()
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
        page_table: int32 `[B, Hkv, max_pages]`; kv_lens: int32 `[B, Hkv]`, keys of each head.
        end: one past the last position seen; max_length: the largest of kv_lens; both on the host.
        hadamard: see KVView.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    max_length: int
    hadamard: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, heads, _ = self.page_table.shape
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
        # Slots of a head hold arbitrary positions, so every slot is read and the mask decides.
        for keys in _chunks_of((KeyRange(0, self.max_length),) if ranges else (), size):
            at = torch.arange(keys.start, keys.stop, device=self.device)
            stored = at < self.kv_lens[..., None]  # [B, Hkv, t]
            pages = self.page_table[..., at // self.page_size].masked_fill(~stored, 0).long()
            slot = at % self.page_size
            positions = self.positions[pages, slot].long().masked_fill(~stored, -1)
            yield KVTile(self.k[pages, slot], self.v[pages, slot], positions)
