"""A cache of int8, int4 or fp8 codes, the newest in full precision (KIVI, arXiv 2402.02750).

Keys are quantised per channel in groups of tokens, values per token; the newest tokens wait in
full precision until a whole group of them can be packed.  Keys and values are first turned by a
Hadamard matrix, which spreads outlier channels (QuaRot, arXiv 2404.00456) and is undone exactly
by the operator.  The history is only ever read tile by tile; no dequantised copy of it exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, expect_tensors
from saccade.cache.step import Cursor, StepWrite
from saccade.core import GrowingKV, KeyRange, QuantizedKV, Unsupported
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.kv_write.quantize import quantize_keys_into, quantize_values_into
from saccade.ops.kv_write.records import KVSlots, PendingRope

GROWTH_STEP = 1024


class QuantizedCache:
    """Keys and values in 8 or 4 bits.

    Args:
        bits_k, bits_v: 8 or 4.
        group: tokens that share a key scale (per channel) and channels that share a value scale
            (per token; the whole head when head_dim is no multiple of it).
        recent: newest tokens that stay in full precision.
        hadamard: rotate keys and values before quantising.
        fp8: eight-bit codes are floating-point numbers (e4m3) instead of whole ones.
        reserve: tokens to allocate codes for at once, when the final length is known.
    """

    def __init__(
        self,
        *,
        bits_k: int = 8,
        bits_v: int = 8,
        group: int = 64,
        recent: int = 64,
        hadamard: bool = True,
        fp8: bool = False,
        reserve: int = 0,
    ) -> None:
        for name, bits in (("bits_k", bits_k), ("bits_v", bits_v)):
            if bits not in (4, 8):
                raise ValueError(f"{name} must be 4 or 8, got {bits}.")
        if fp8 and (bits_k, bits_v) != (8, 8):
            raise ValueError(f"fp8 codes have 8 bits, got bits_k={bits_k} and bits_v={bits_v}.")
        if group < 1 or recent < 0:
            raise ValueError(f"group must be >= 1 and recent >= 0, got {group} and {recent}.")
        self._bits_k, self._bits_v, self._group, self._fp8 = bits_k, bits_v, group, fp8
        self._recent_kept, self._hadamard, self._reserve = recent, hadamard, reserve
        self._k: QuantizedTensor | None = None
        self._v: QuantizedTensor | None = None
        self._packed = 0
        self._recent_k: Tensor | None = None
        self._recent_v: Tensor | None = None
        self._fresh = 0  # tokens in the recent buffer
        self._packed_there: Tensor | None = None  # `_packed` as steps on the device read it
        self._packed_told = -1

    @property
    def seen(self) -> int:
        return self._packed + self._fresh

    @property
    def nbytes(self) -> int:
        parts: list[Tensor] = [*(self._k or ()), *(self._v or ())]
        others = (self._recent_k, self._recent_v, self._packed_there)
        parts += [x for x in others if x is not None]
        return sum(part.nbytes for part in parts)

    def append(self, k: Tensor, v: Tensor) -> QuantizedKV:
        """Store a chunk; see LayerCache.  A chunk attends to itself in full precision."""
        if self._hadamard:
            k, v = hadamard_transform(k), hadamard_transform(v)
        self._allocate(k, v)
        assert self._recent_k is not None and self._recent_v is not None
        self._pack(self._fresh - self._recent_kept)
        stop = self._fresh + k.shape[2]
        if stop <= self._recent_k.shape[2]:
            self._recent_k[:, :, self._fresh : stop] = k
            self._recent_v[:, :, self._fresh : stop] = v
            self._fresh = stop
            return self._view(self._recent_k[:, :, :stop], self._recent_v[:, :, :stop])
        return self._append_large(k, v)

    def reserve(self, count: int) -> None:
        """See SteppingCache; whole groups are packed here, between two steps."""
        if self._recent_k is None:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        self._pack(self._fresh - self._recent_kept)
        self._make_room(self._packed + self._recent_k.shape[2])
        if self._fresh + count > self._recent_k.shape[2]:
            raise Unsupported(f"a quantised cache cannot take {count} tokens in one step.")
        if self._packed_there is None:
            self._packed_there = torch.empty(1, dtype=torch.int64, device=self._recent_k.device)
        if self._packed_told != self._packed:
            self._packed_there.fill_(self._packed)
            self._packed_told = self._packed

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        tensors = (*(self._k or ()), *(self._v or ()), self._recent_k, self._recent_v)
        assert self._v is not None
        return *(x.data_ptr() for x in tensors if x is not None), self._v.qdata.shape[2]

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepWrite:
        """See SteppingCache; new tokens join the recent ones."""
        assert self._k is not None and self._v is not None, "claim comes first"
        assert self._recent_k is not None and self._recent_v is not None
        assert self._packed_there is not None
        recent = KVSlots(
            self._recent_k, self._recent_v, cursor.start, self._packed_there, self._hadamard
        )
        q = append(recent, k, v, rope)
        stored = self._viewed(self._k, self._v, self._recent_k, self._recent_v)
        return StepWrite(GrowingKV(stored, self._packed_there), cursor, q)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self._fresh += count

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._k is None or self._v is None:
            return
        assert self._recent_k is not None and self._recent_v is not None
        self._k = QuantizedTensor(*(part.index_select(0, rows) for part in self._k))
        self._v = QuantizedTensor(*(part.index_select(0, rows) for part in self._v))
        self._recent_k = self._recent_k.index_select(0, rows)
        self._recent_v = self._recent_v.index_select(0, rows)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Where that cuts a packed group, the rest of the group is opened again: what was lost when
        it was packed does not come back.
        """
        if length >= self._packed:
            self._fresh = min(self._fresh, length - self._packed)
            return
        assert self._recent_k is not None and self._recent_v is not None
        first = length // self._group * self._group
        k, v = self._opened(first, length)
        self._packed, self._fresh = first, length - first
        self._recent_k[:, :, : self._fresh] = k
        self._recent_v[:, :, : self._fresh] = v

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self.seen)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Forget positions start .. stop-1; later keys move down, re-rotated and packed again.

        Packed keys are quantised once more, which adds about as much error as the first time.
        What lies behind `start` is in full precision meanwhile, in this one layer.
        """
        first = min(start, self._packed) // self._group * self._group
        k, v = self._opened(first, self.seen)
        if self._hadamard:
            k, v = hadamard_transform(k), hadamard_transform(v)
        kept, later = start - first, stop - first
        k = torch.cat((k[:, :, :kept], shift(k[:, :, later:], start - stop)), dim=2)
        v = torch.cat((v[:, :, :kept], v[:, :, later:]), dim=2)
        self._packed, self._fresh = first, 0
        self.append(k, v)

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._packed = self._fresh = 0

    def state(self) -> CacheState:
        """See LayerCache."""
        settings = {
            "bits_k": self._bits_k,
            "bits_v": self._bits_v,
            "group": self._group,
            "recent": self._recent_kept,
            "hadamard": self._hadamard,
            "fp8": self._fp8,
        }
        progress = {"packed": self._packed, "fresh": self._fresh, "capacity": 0}
        if self._v is None or self._recent_k is None or self._recent_v is None:
            return CacheState(settings, progress, {})
        progress["capacity"] = self._v.qdata.shape[2]
        view = self._view(self._recent_k[:, :, : self._fresh], self._recent_v[:, :, : self._fresh])
        parts = {f"k.{name}": x for name, x in view.k._asdict().items()}
        parts |= {f"v.{name}": x for name, x in view.v._asdict().items()}
        parts |= {"recent.k": view.recent_k, "recent.v": view.recent_v}
        return CacheState(settings, progress, parts)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        packed, fresh = state.progress["packed"], state.progress["fresh"]
        groups = packed // self._group
        lengths = {"k.qdata": packed, "k.scale": groups, "k.offset": groups}
        lengths |= dict.fromkeys(("v.qdata", "v.scale", "v.offset"), packed)
        expect_tensors(state, lengths | {"recent.k": fresh, "recent.v": fresh})
        self._k = self._v = self._recent_k = self._recent_v = None
        self._packed, self._fresh = packed, fresh
        if not state.tensors:
            return
        parts = {name: x.to(device) for name, x in state.tensors.items()}
        parts |= {name: parts[name].view(torch.uint8) for name in ("k.qdata", "v.qdata")}
        capacity = max(packed, state.progress["capacity"])
        rooms = (capacity, capacity // self._group, capacity // self._group)
        names = ("qdata", "scale", "offset")
        keys = [_extended(parts[f"k.{n}"], room) for n, room in zip(names, rooms, strict=True)]
        self._k = QuantizedTensor(*keys)
        self._v = QuantizedTensor(*(_extended(parts[f"v.{n}"], capacity) for n in names))
        slots = self._recent_kept + 2 * self._group
        self._recent_k = _extended(parts["recent.k"], slots)
        self._recent_v = _extended(parts["recent.v"], slots)

    def _append_large(self, k: Tensor, v: Tensor) -> QuantizedKV:
        """A chunk larger than the recent buffer: lend it as it is, keep codes and the end."""
        assert self._recent_k is not None and self._recent_v is not None
        k = torch.cat((self._recent_k[:, :, : self._fresh], k), dim=2)
        v = torch.cat((self._recent_v[:, :, : self._fresh], v), dim=2)
        view = self._view(k, v)
        packed = max(0, k.shape[2] - self._recent_kept) // self._group * self._group
        self._store(k[:, :, :packed], v[:, :, :packed])
        self._fresh = k.shape[2] - packed
        self._recent_k[:, :, : self._fresh] = k[:, :, packed:]
        self._recent_v[:, :, : self._fresh] = v[:, :, packed:]
        return view

    def _pack(self, ready: int) -> None:
        """Pack as many whole groups as fit in the `ready` oldest recent tokens."""
        count = max(0, ready) // self._group * self._group
        if not count:
            return
        assert self._recent_k is not None and self._recent_v is not None
        self._store(self._recent_k[:, :, :count], self._recent_v[:, :, :count])
        rest = self._fresh - count
        for buffer in (self._recent_k, self._recent_v):
            buffer[:, :, :rest] = buffer[:, :, count : self._fresh].clone()
        self._fresh = rest

    def _store(self, k: Tensor, v: Tensor) -> None:
        """Quantise whole groups behind the packed history."""
        count = k.shape[2]
        if not count:
            return
        self._make_room(self._packed + count)
        assert self._k is not None and self._v is not None
        tokens = slice(self._packed, self._packed + count)
        groups = slice(tokens.start // self._group, tokens.stop // self._group)
        keys = QuantizedTensor(self._k.qdata[:, :, tokens], *(s[:, :, groups] for s in self._k[1:]))
        values = QuantizedTensor(*(part[:, :, tokens] for part in self._v))
        quantize_keys_into(k, self._typed(keys), bits=self._bits_k, group=self._group)
        v_group = self._v_group(v.shape[3])
        quantize_values_into(v, self._typed(values), bits=self._bits_v, group=v_group)
        self._packed += count

    def _view(self, recent_k: Tensor, recent_v: Tensor) -> QuantizedKV:
        assert self._k is not None and self._v is not None
        groups = self._packed // self._group
        keys = (self._k.qdata[:, :, : self._packed], *(s[:, :, :groups] for s in self._k[1:]))
        values = (part[:, :, : self._packed] for part in self._v)
        return self._viewed(QuantizedTensor(*keys), QuantizedTensor(*values), recent_k, recent_v)

    def _viewed(
        self, k: QuantizedTensor, v: QuantizedTensor, recent_k: Tensor, recent_v: Tensor
    ) -> QuantizedKV:
        return QuantizedKV(
            k=self._typed(k),
            v=self._typed(v),
            recent_k=recent_k,
            recent_v=recent_v,
            bits_k=self._bits_k,
            bits_v=self._bits_v,
            k_group=self._group,
            hadamard=self._hadamard,
        )

    def _opened(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at the positions first .. stop-1 in full precision, still turned."""
        assert self._recent_k is not None and self._recent_v is not None
        view = self._view(self._recent_k[:, :, : self._fresh], self._recent_v[:, :, : self._fresh])
        tiles = list(view.tiles((KeyRange(first, stop),), max(stop - first, 1)))
        k = [self._recent_k[:, :, :0], *(tile.k for tile in tiles)]
        v = [self._recent_v[:, :, :0], *(tile.v for tile in tiles)]
        return torch.cat(k, dim=2), torch.cat(v, dim=2)

    def _typed(self, coded: QuantizedTensor) -> QuantizedTensor:
        """Codes are stored as bytes; as fp8 they are only lent."""
        return coded._replace(qdata=coded.qdata.view(FP8)) if self._fp8 else coded

    def _v_group(self, dim: int) -> int:
        return self._group if dim % self._group == 0 else dim

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        if self._k is not None:
            return
        batch, heads, _, dim = k.shape
        value_dim = v.shape[3]
        slots = self._recent_kept + 2 * self._group
        self._recent_k = k.new_empty(batch, heads, slots, dim)
        self._recent_v = v.new_empty(batch, heads, slots, value_dim)
        v_groups = value_dim // self._v_group(value_dim)

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, heads, 0, width, dtype=dtype, device=k.device)

        self._k = QuantizedTensor(
            empty(dim * self._bits_k // 8, torch.uint8),
            empty(dim, torch.float16),
            empty(dim, torch.float16),
        )
        self._v = QuantizedTensor(
            empty(value_dim * self._bits_v // 8, torch.uint8),
            empty(v_groups, torch.float16),
            empty(v_groups, torch.float16),
        )

    def _make_room(self, tokens: int) -> None:
        assert self._k is not None and self._v is not None
        if tokens <= self._v.qdata.shape[2]:
            return
        step = -(-GROWTH_STEP // self._group) * self._group
        capacity = max(-(-tokens // step) * step, -(-self._reserve // step) * step)
        groups = capacity // self._group
        self._k = QuantizedTensor(
            _extended(self._k.qdata, capacity), *(_extended(s, groups) for s in self._k[1:])
        )
        self._v = QuantizedTensor(*(_extended(part, capacity) for part in self._v))


def _extended(x: Tensor, length: int) -> Tensor:
    """A copy of `x` `[B, H, n, ...]` with room for `length` entries."""
    new = x.new_empty(*x.shape[:2], length, *x.shape[3:])
    new[:, :, : x.shape[2]] = x
    return new
