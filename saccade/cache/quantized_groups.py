"""The history of a quantized cache: full groups of tokens, in buffers that grow in small steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.base import chosen_rows
from saccade.cache.dense import extended
from saccade.cache.magnitude import check_magnitude
from saccade.core import QuantizedKV
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.kv_write.quantize import quantize_keys_into, quantize_values_into

GROWTH_SHARE = 32
"""Full buffers grow by one group or a 32nd: copying them costs a few per cent of reading them."""


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """How tokens are quantized.

    Args:
        bits_k, bits_v: 8 or 4.
        group: tokens that share a key scale (per channel) and channels that share a value scale
            (per token; the full head when head_dim is no multiple of it).
        hadamard: apply `hadamard_transform` to keys and values before quantizing.
        fp8: float8_e4m3fn instead of uint8.

    Raises:
        ValueError: bits other than 4 and 8, fp8 with 4 bits, group below 1.
    """

    bits_k: int = 8
    bits_v: int = 8
    group: int = 64
    hadamard: bool = True
    fp8: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("bits_k", self.bits_k), ("bits_v", self.bits_v)):
            if bits not in (4, 8):
                raise ValueError(f"{name} must be 4 or 8, got {bits}.")
        if self.fp8 and (self.bits_k, self.bits_v) != (8, 8):
            raise ValueError(
                f"fp8 needs 8 bits, got bits_k={self.bits_k} and bits_v={self.bits_v}."
            )
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}.")

    def whole(self, tokens: int) -> int:
        """The tokens of the full groups among so many."""
        return max(0, tokens) // self.group * self.group

    def value_group(self, dim: int) -> int:
        """Channels of a value that share a scale."""
        return self.group if dim % self.group == 0 else dim


STEPPING_ROOM = 1024
"""Tokens by which they grow between captured steps, which are captured anew where memory moves."""


def grown_groups(have: int, wanted: int, group: int, room: int) -> int:
    """Tokens to allocate where `wanted` exceed `have`: `room` if enough, else a little more."""
    if wanted <= room:
        return room
    grown = have + have // GROWTH_SHARE // group * group
    return max(-(-wanted // group) * group, grown)


class QuantizedGroups:
    """Quantized tokens `length`, a multiple of the group, the oldest first.

    Args:
        fmt: how they are quantized.
        room: tokens to allocate for at once, when the final length is known.
    """

    def __init__(self, fmt: QuantizedFormat, room: int = 0) -> None:
        self.fmt, self._room = fmt, fmt.whole(room)
        self.length = 0
        self.k: QuantizedTensor | None = None
        self.v: QuantizedTensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All buffers; none before `allocate`."""
        return *(self.k or ()), *(self.v or ())

    @property
    def capacity(self) -> int:
        """Tokens that memory is there for."""
        return 0 if self.v is None else self.v.qdata.shape[2]

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Empty buffers for keys and values like these, where there are none yet."""
        if self.k is not None:
            return
        fmt, (batch, heads, _, dim), value_dim = self.fmt, k.shape, v.shape[3]

        def empty(num_bytes: int, scales: int) -> QuantizedTensor:
            qdata, scale, offset = (
                torch.empty(batch, heads, 0, width, dtype=dtype, device=k.device)
                for width, dtype in ((num_bytes, torch.uint8), *[(scales, torch.float16)] * 2)
            )
            return QuantizedTensor(qdata, scale, offset)

        self.k = empty(dim * fmt.bits_k // 8, dim)
        self.v = empty(value_dim * fmt.bits_v // 8, value_dim // fmt.value_group(value_dim))

    def free(self) -> None:
        """Remove everything, memory included."""
        self.k = self.v = None
        self.length = 0

    def make_room(self, tokens: int, *, more: int = 0) -> None:
        """Memory for so many tokens; where there is too little, for `more` at once."""
        if tokens > self.capacity:
            wanted = self.fmt.whole(tokens + more)
            self._resize(grown_groups(self.capacity, wanted, self.fmt.group, self._room))

    def append(self, k: Tensor, v: Tensor) -> None:
        """Quantize full groups and store them behind the others.

        Raises:
            ValueError: numbers that float16 scales cannot hold; nothing was stored.
        """
        count = k.shape[2]
        if not count:
            return
        check_magnitude(k, v)
        self.make_room(self.length + count)
        if k.is_meta:  # of a plan
            self.length += count
            return
        fmt, (keys, values) = self.fmt, self.stored(self.length, self.length + count)
        quantize_keys_into(k, keys, bits=fmt.bits_k, group=fmt.group)
        quantize_values_into(v, values, bits=fmt.bits_v, group=fmt.value_group(v.shape[3]))
        unknown = k.isnan().any(-1, keepdim=True) | v.isnan().any(-1, keepdim=True)
        values.offset.masked_fill_(unknown, torch.nan)
        self.length += count

    def drop(self, count: int) -> None:
        """Remove the oldest `count` tokens, a multiple of the group; the others move down."""
        if count < self.length:
            for part in self.parts:
                used, gone = (n * part.shape[2] // self.capacity for n in (self.length, count))
                part[:, :, : used - gone] = part[:, :, gone:used].clone()
        self.length -= min(count, self.length)

    def copies(self) -> tuple[Tensor, ...]:
        """Copies of what is stored, for `put_back`."""
        keys, values = self.stored(0, self.length)
        return tuple(part.clone() for part in (*keys, *values))

    def put_back(self, parts: tuple[Tensor, ...], length: int) -> None:
        """Store `length` tokens of `copies` again, in place of everything."""
        self.make_room(length)
        self.length = length
        keys, values = self.stored(0, length)
        for part, saved in zip((*keys, *values), parts, strict=True):
            part.copy_(saved)

    def restore(self, k: QuantizedTensor, v: QuantizedTensor, capacity: int) -> None:
        """Store these groups in place of everything, with room for `capacity` tokens."""
        self.k, self.v = k, v
        self.length = v.qdata.shape[2]
        self._resize(max(self.length, capacity))

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self.k is not None and self.v is not None:
            self.k = QuantizedTensor(*(chosen_rows(part, rows) for part in self.k))
            self.v = QuantizedTensor(*(chosen_rows(part, rows) for part in self.v))

    def stored(self, start: int, stop: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The tokens start .. stop-1, whole groups, in place; qdata as float8_e4m3fn for fp8."""
        assert self.k is not None and self.v is not None
        tokens = slice(start, stop)
        groups = slice(start // self.fmt.group, stop // self.fmt.group)
        keys = QuantizedTensor(self.k.qdata[:, :, tokens], *(s[:, :, groups] for s in self.k[1:]))
        values = QuantizedTensor(*(part[:, :, tokens] for part in self.v))
        if self.fmt.fp8:
            keys, values = (x._replace(qdata=x.qdata.view(FP8)) for x in (keys, values))
        return keys, values

    def view(self, recent_k: Tensor, recent_v: Tensor, *, first: int = 0) -> QuantizedKV:
        """What is stored, and recent tokens behind it; `first` is the position of the oldest."""
        return self._view(self.length, recent_k, recent_v, first)

    def whole_view(self, recent_k: Tensor, recent_v: Tensor) -> QuantizedKV:
        """All buffers, filled or not, for a captured step."""
        return self._view(self.capacity, recent_k, recent_v, 0)

    def _view(self, stop: int, recent_k: Tensor, recent_v: Tensor, first: int) -> QuantizedKV:
        keys, values = self.stored(0, stop)
        fmt = self.fmt
        return QuantizedKV(
            k=keys,
            v=values,
            recent_k=recent_k,
            recent_v=recent_v,
            bits_k=fmt.bits_k,
            bits_v=fmt.bits_v,
            k_group=fmt.group,
            hadamard=fmt.hadamard,
            first=first,
        )

    def _resize(self, capacity: int) -> None:
        assert self.k is not None and self.v is not None
        groups = capacity // self.fmt.group
        self.k = QuantizedTensor(
            extended(self.k.qdata, capacity), *(extended(s, groups) for s in self.k[1:])
        )
        self.v = QuantizedTensor(*(extended(part, capacity) for part in self.v))
