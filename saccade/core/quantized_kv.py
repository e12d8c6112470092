"""Views of quantized storage: a quantized history and recent keys in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.formats import QuantizedTensor, dequantize_keys, dequantize_values
from saccade.core.kv import KVTile, consecutive, split_ranges
from saccade.core.mask import KeyRange


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """A quantized history (positions 0 .. N-1) and a full-precision recent part behind it.

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
        """Number of quantized keys, a multiple of `k_group`."""
        return self.k.qdata.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        batch, heads, recent, dim = self.recent_k.shape
        return batch, heads, self.num_quantized + recent, dim, self.recent_v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """See KVView."""
        return self.recent_k.dtype

    @property
    def device(self) -> torch.device:
        """See KVView."""
        return self.recent_k.device

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        for keys in split_ranges(ranges, size):
            quantized = KeyRange(keys.start, min(keys.stop, self.num_quantized))
            if quantized.start < quantized.stop:
                yield self._quantized_tile(quantized)
            recent = KeyRange(max(keys.start, self.num_quantized), keys.stop)
            if recent.start < recent.stop:
                at, count = recent.start - self.num_quantized, recent.stop - recent.start
                yield KVTile(
                    self.recent_k.narrow(2, at, count),
                    self.recent_v.narrow(2, at, count),
                    consecutive(*recent, self.device),
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
            consecutive(*keys, self.device),
        )


@dataclass(frozen=True, slots=True)
class GrowingKV:
    """A quantized view in a captured decoding step, where how much is filled is a device tensor.

    Recent slot i holds position num_quantized + i.  How many recent slots are filled is in the
    `kv_lens` of the call.

    Args:
        stored: all storage, filled or not.
        num_quantized: int64 `[1]`, quantized keys that are filled.
    """

    stored: QuantizedKV
    num_quantized: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """See KVView."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """See KVView."""
        return self.stored.device

    @property
    def hadamard(self) -> bool:
        """See KVView."""
        return self.stored.hadamard

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        history = self.stored.num_quantized
        within = [KeyRange(first, min(last, history)) for first, last in ranges]
        for tile in self.stored.tiles(within, size):
            filled = tile.positions < self.num_quantized
            yield tile._replace(positions=tile.positions.where(filled, -1))
        # The positions of recent keys are on the device, so all of them are read.
        end = self.stored.shape[2]
        for tile in self.stored.tiles((KeyRange(history, end),) if ranges else (), size):
            yield tile._replace(positions=tile.positions - history + self.num_quantized)
