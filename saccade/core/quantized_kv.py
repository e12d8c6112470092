"""Views of quantized storage: a quantized history and recent keys in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.core.check import (
    LAYOUT,
    check_bounds,
    check_device,
    check_exactly,
    check_tensor,
    describe,
    integer,
)
from saccade.core.formats import FP8, QuantizedTensor, dequantize_keys, dequantize_values
from saccade.core.kv import KVTile, check_storage, consecutive, split_ranges
from saccade.core.mask import KeyRange


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """A quantized history of N keys and a full-precision recent part behind it.

    Args:
        k: of `formats.quantize_keys`, scales per channel and `k_group` tokens.
        v: of `formats.quantize_values`, scales per token.
        recent_k, recent_v: newest keys and values `[B, Hkv, R, D]`, behind the history.
        bits_k, bits_v: 4 or 8 (integers, or fp8 where `qdata` is float8_e4m3fn).
        k_group: tokens that share a key scale.
        hadamard: keys and values were stored after `hadamard_transform`.
        first: position of the first key, above 0 where a window has left the keys before it.

    Raises:
        TypeError, ValueError: tensors that do not fit together.
    """

    k: QuantizedTensor
    v: QuantizedTensor
    recent_k: Tensor
    recent_v: Tensor
    bits_k: int
    bits_v: int
    k_group: int
    hadamard: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        integer("first", self.first, 0)
        check_storage(self.recent_k, self.recent_v, LAYOUT, 3, "batch, heads and length")
        batch, heads, _, dim = self.recent_k.shape
        value_dim, group = self.recent_v.shape[3], integer("k_group", self.k_group, 1)
        keys = _check_quantized("k", self.k, self.bits_k, dim, self.recent_k)
        values = _check_quantized("v", self.v, self.bits_v, value_dim, self.recent_k)
        tokens, channels = keys.qdata.shape[2], values.scale.shape[3]
        if tokens % group or channels == 0 or value_dim % channels:
            raise ValueError(
                f"quantized keys must fill groups of k_group={group} tokens and values full groups "
                f"of channels, got {tokens} tokens and {value_dim} channels in {channels} groups."
            )
        rows = (batch, heads)
        _check_scales("k", keys, (*rows, tokens), (*rows, tokens // group, dim))
        _check_scales("v", values, (*rows, tokens), (*rows, tokens, channels))

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """See KVView."""
        scales = (self.k.scale, self.k.offset, self.v.scale, self.v.offset)
        return self.recent_k, self.recent_v, *scales

    @property
    def num_quantized(self) -> int:
        """Number of quantized keys, a multiple of `k_group`."""
        return self.k.qdata.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        batch, heads, recent, dim = self.recent_k.shape
        end = self.first + self.num_quantized + recent
        return batch, heads, end, dim, self.recent_v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """See KVView."""
        return self.recent_k.dtype

    @property
    def device(self) -> torch.device:
        """See KVView."""
        return self.recent_k.device

    def in_dtype(self, dtype: torch.dtype) -> QuantizedKV:
        """The same keys and values, computed and held in another dtype where they are no codes."""
        return replace(self, recent_k=self.recent_k.to(dtype), recent_v=self.recent_v.to(dtype))

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        first, history = self.first, self.num_quantized
        within = [KeyRange(max(start - first, 0), stop - first) for start, stop in ranges]
        for keys in split_ranges(within, size):
            quantized = KeyRange(keys.start, min(keys.stop, history))
            if quantized.start < quantized.stop:
                yield self._quantized_tile(quantized)
            recent = KeyRange(max(keys.start, history), keys.stop)
            if recent.start < recent.stop:
                at, count = recent.start - history, recent.stop - recent.start
                yield KVTile(
                    self.recent_k.narrow(2, at, count),
                    self.recent_v.narrow(2, at, count),
                    consecutive(first + recent.start, first + recent.stop, self.device),
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
            consecutive(self.first + keys.start, self.first + keys.stop, self.device),
        )


def _check_quantized(name: str, x: object, bits: int, dim: int, recent: Tensor) -> QuantizedTensor:
    """`x`, quantized data whose dtypes, bits, channels and device fit the recent tensor."""
    if not isinstance(x, QuantizedTensor):
        raise TypeError(f"{name} must be a QuantizedTensor, got {describe(x)}.")
    if integer(f"bits_{name}", bits) not in (4, 8) or (bits == 4 and dim % 2):
        raise ValueError(
            f"bits_{name} must be 8, or 4 for an even number of channels, got {bits} for {dim}."
        )
    kinds = (torch.uint8,) if bits == 4 else (torch.uint8, FP8)
    check_tensor(f"{name}.qdata", x.qdata, kinds, LAYOUT)
    if x.qdata.shape[3] * 8 != dim * bits:
        raise ValueError(
            f"{name}.qdata must have {dim * bits // 8} bytes for {dim} channels of {bits} bits, "
            f"got {x.qdata.shape[3]}."
        )
    check_tensor(f"{name}.scale", x.scale, (torch.float16,), "batch, heads, n, m")
    check_device(f"{name}.qdata", x.qdata, recent.device)
    return x


def _check_scales(
    name: str, x: QuantizedTensor, shape: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    """Raise ValueError unless qdata has that batch, heads and length, and scales their shape."""
    if tuple(x.qdata.shape[:3]) != shape:
        raise ValueError(
            f"{name}.qdata must share batch and heads with the recent keys, and keys their length "
            f"with values: expected {list(shape)}, got {list(x.qdata.shape[:3])}."
        )
    for part in ("scale", "offset"):
        data = getattr(x, part)
        check_exactly(f"{name}.{part}", data, (torch.float16,), scales, x.qdata.device)


@dataclass(frozen=True, slots=True)
class GrowingKV:
    """A quantized view in a captured decoding step, where how much is filled is a device tensor.

    Recent slot i holds position num_quantized + i.  How many recent slots are filled is in the
    `kv_lens` of the call.

    Args:
        stored: all storage, filled or not, from position 0 on.
        num_quantized: int64 `[1]`, quantized keys that are filled.
    """

    stored: QuantizedKV
    num_quantized: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.stored, QuantizedKV):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"stored must be a QuantizedKV, got {type(self.stored).__name__}.")
        check_exactly("num_quantized", self.num_quantized, (torch.int64,), (1,), self.device)
        check_bounds("num_quantized", self.num_quantized, 0, self.stored.num_quantized)

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """See KVView."""
        return self.stored.floats

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

    def in_dtype(self, dtype: torch.dtype) -> GrowingKV:
        """See QuantizedKV."""
        return replace(self, stored=self.stored.in_dtype(dtype))

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
