"""A cache in int8, int4 or fp8, the newest tokens in full precision (KIVI, arXiv 2402.02750).

Keys are quantized per channel in groups of tokens, values per token; the newest tokens stay in full
precision until a full group of them can be quantized.  `hadamard_transform` is applied to keys and
values first, which spreads outlier channels (QuaRot, arXiv 2404.00456); the operator applies it to
queries and output.  Kernels dequantize tile by tile; no dequantized copy of the history exists.

Numbers beyond float16 are refused, since scales and offsets are float16.  A token with a NaN in its
key or value (padding may hold anything) changes no other token; a query that does attend to it gets
NaN, as without quantization: the token's value is stored as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import (
    CacheState,
    ShiftKeys,
    check_append,
    check_length,
    check_rows,
    check_shift,
    expect_tensors,
    fits,
)
from saccade.cache.dense import extended
from saccade.cache.magnitude import check_magnitude
from saccade.cache.step import Cursor, StepView
from saccade.core import GrowingKV, KeyRange, QuantizedKV, Unsupported
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.kv_write.quantize import quantize_keys_into, quantize_values_into
from saccade.ops.kv_write.records import KVSlots, PendingRope

GROWTH_STEP = 1024


class QuantizedCache:
    """Keys and values in 8 or 4 bits; see LayerCache.

    Args:
        bits_k, bits_v: 8 or 4.
        group: tokens that share a key scale (per channel) and channels that share a value scale
            (per token; the full head when head_dim is no multiple of it).
        recent: newest tokens that stay in full precision, at least.
        hadamard: apply `hadamard_transform` to keys and values before quantizing.
        fp8: float8_e4m3fn instead of uint8.
        reserve: tokens to allocate for at once, when the final length is known.

    Raises:
        ValueError: bits other than 4 and 8, fp8 with 4 bits, group below 1, recent below 0.
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
            raise ValueError(f"fp8 needs 8 bits, got bits_k={bits_k} and bits_v={bits_v}.")
        if group < 1 or recent < 0:
            raise ValueError(f"group must be >= 1 and recent >= 0, got {group} and {recent}.")
        self._bits_k, self._bits_v, self._group, self._fp8 = bits_k, bits_v, group, fp8
        self._min_recent, self._hadamard, self._reserve = recent, hadamard, reserve
        self._k: QuantizedTensor | None = None
        self._v: QuantizedTensor | None = None
        self._num_quantized = 0
        self._recent_k: Tensor | None = None
        self._recent_v: Tensor | None = None
        self._num_recent = 0
        self._num_quantized_tensor: Tensor | None = None  # int64 [1], read by captured steps
        self._num_quantized_synced = -1  # the value that was written to it last

    @property
    def seen(self) -> int:
        """Tokens appended so far."""
        return self._num_quantized + self._num_recent

    @property
    def reserved(self) -> int:
        """Tokens to allocate for at once."""
        return self._reserve

    @property
    def growth_step(self) -> int:
        """Tokens by which storage grows: whole groups."""
        return -(-GROWTH_STEP // self._group) * self._group

    @property
    def nbytes(self) -> int:
        """Bytes of quantized storage, scales, offsets and the recent buffer."""
        parts: list[Tensor] = [*(self._k or ()), *(self._v or ())]
        others = (self._recent_k, self._recent_v, self._num_quantized_tensor)
        parts += [x for x in others if x is not None]
        return sum(part.nbytes for part in parts)

    def append(self, k: Tensor, v: Tensor) -> QuantizedKV:
        """Store a chunk; see LayerCache.  The view holds the new chunk in full precision."""
        if not self.seen and not (fits(k, self._recent_k) and fits(v, self._recent_v)):
            self._k = self._v = self._recent_k = self._recent_v = None  # another batch
        check_append(k, v, self._recent_k, self._recent_v)
        if self._hadamard:
            k, v = hadamard_transform(k), hadamard_transform(v)
            if k.dtype == torch.float16:
                check_magnitude(k, v)  # the transform can overflow
        self._allocate(k, v)
        assert self._recent_k is not None and self._recent_v is not None
        self._quantize_oldest(self._num_recent - self._min_recent)
        stop = self._num_recent + k.shape[2]
        if stop <= self._recent_k.shape[2]:
            self._recent_k[:, :, self._num_recent : stop] = k
            self._recent_v[:, :, self._num_recent : stop] = v
            self._num_recent = stop
            return self._view(self._recent_k[:, :, :stop], self._recent_v[:, :, :stop])
        return self._append_large(k, v)

    def reserve(self, count: int) -> None:
        """See SteppingCache; full groups are quantized here, between two steps."""
        if self._recent_k is None:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        self._quantize_oldest(self._num_recent - self._min_recent)
        self._make_room(self._num_quantized + self._recent_k.shape[2])
        room = self._recent_k.shape[2] - self._num_recent
        if count > room:
            raise Unsupported(
                f"a quantized cache takes up to {room} tokens a step, not {count}. Append them."
            )
        self._sync_num_quantized(self._recent_k.device)

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        others = self._recent_k, self._recent_v, self._num_quantized_tensor
        tensors = (*(self._k or ()), *(self._v or ()), *others)
        assert self._v is not None
        return *(x.data_ptr() for x in tensors if x is not None), self._v.qdata.shape[2]

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """See SteppingCache; new tokens are written to the recent buffer."""
        assert self._k is not None and self._v is not None, "reserve comes first"
        assert self._recent_k is not None and self._recent_v is not None
        assert self._num_quantized_tensor is not None
        recent = KVSlots(
            self._recent_k, self._recent_v, cursor.start, self._num_quantized_tensor, self._hadamard
        )
        q = append(recent, k, v, rope)
        stored = self._make_view(self._k, self._v, self._recent_k, self._recent_v)
        return StepView(GrowingKV(stored, self._num_quantized_tensor), cursor, q)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self._num_recent += count

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._recent_k is not None:
            check_rows(rows, self._recent_k.shape[0])
        if self._k is None or self._v is None:
            return
        assert self._recent_k is not None and self._recent_v is not None
        self._k = QuantizedTensor(*(part.index_select(0, rows) for part in self._k))
        self._v = QuantizedTensor(*(part.index_select(0, rows) for part in self._v))
        self._recent_k = self._recent_k.index_select(0, rows)
        self._recent_v = self._recent_v.index_select(0, rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Where that cuts a quantized group, the rest of the group is dequantized into the recent
        buffer; its quantization error stays.
        """
        check_length(length)
        if length >= self._num_quantized:
            self._num_recent = min(self._num_recent, length - self._num_quantized)
            return
        assert self._recent_k is not None and self._recent_v is not None
        first = length // self._group * self._group
        k, v = self._dequantize(first, length)
        self._num_quantized, self._num_recent = first, length - first
        self._recent_k[:, :, : self._num_recent] = k
        self._recent_v[:, :, : self._num_recent] = v

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self.seen)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated and quantized again.

        Quantizing once more adds about as much error as the first time.  Meanwhile the tokens from
        `start` on are in full precision, in this one layer.
        """
        check_shift(start, stop, self.seen)
        first = min(start, self._num_quantized) // self._group * self._group
        k, v = self._dequantize(first, self.seen)
        if self._hadamard:
            k, v = hadamard_transform(k), hadamard_transform(v)
        kept, later = start - first, stop - first
        k = torch.cat((k[:, :, :kept], shift(k[:, :, later:], start - stop)), dim=2)
        v = torch.cat((v[:, :, :kept], v[:, :, later:]), dim=2)
        self._num_quantized, self._num_recent = first, 0
        self.append(k, v)

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        self._num_quantized = self._num_recent = 0

    def state(self) -> CacheState:
        """See LayerCache."""
        settings = {
            "bits_k": self._bits_k,
            "bits_v": self._bits_v,
            "group": self._group,
            "recent": self._min_recent,
            "hadamard": self._hadamard,
            "fp8": self._fp8,
        }
        progress = {"quantized": self._num_quantized, "recent": self._num_recent, "capacity": 0}
        if self._v is None:
            return CacheState(settings, progress, {})
        progress["capacity"] = self._v.qdata.shape[2]
        view = self._stored_view()
        parts = {f"k.{name}": x for name, x in view.k._asdict().items()}
        parts |= {f"v.{name}": x for name, x in view.v._asdict().items()}
        parts |= {"recent.k": view.recent_k, "recent.v": view.recent_v}
        return CacheState(settings, progress, parts)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        quantized, recent = state.progress["quantized"], state.progress["recent"]
        groups = quantized // self._group
        lengths = {"k.qdata": quantized, "k.scale": groups, "k.offset": groups}
        lengths |= dict.fromkeys(("v.qdata", "v.scale", "v.offset"), quantized)
        expect_tensors(state, lengths | {"recent.k": recent, "recent.v": recent})
        self._k = self._v = self._recent_k = self._recent_v = None
        self._num_quantized, self._num_recent = quantized, recent
        if not state.tensors:
            return
        parts = {name: x.to(device) for name, x in state.tensors.items()}
        parts |= {name: parts[name].view(torch.uint8) for name in ("k.qdata", "v.qdata")}
        capacity = max(quantized, state.progress["capacity"])
        rooms = (capacity, capacity // self._group, capacity // self._group)
        names = ("qdata", "scale", "offset")
        keys = [extended(parts[f"k.{n}"], room) for n, room in zip(names, rooms, strict=True)]
        self._k = QuantizedTensor(*keys)
        self._v = QuantizedTensor(*(extended(parts[f"v.{n}"], capacity) for n in names))
        slots = self._min_recent + 2 * self._group
        self._recent_k = extended(parts["recent.k"], slots)
        self._recent_v = extended(parts["recent.v"], slots)

    def _sync_num_quantized(self, device: torch.device) -> None:
        """Write the number of quantized tokens to the tensor that captured steps read."""
        if self._num_quantized_tensor is None:
            self._num_quantized_tensor = torch.empty(1, dtype=torch.int64, device=device)
        if self._num_quantized_synced != self._num_quantized:
            self._num_quantized_tensor.fill_(self._num_quantized)
            self._num_quantized_synced = self._num_quantized

    def _append_large(self, k: Tensor, v: Tensor) -> QuantizedKV:
        """Append more than the recent buffer takes: exact in the view, quantized in storage."""
        assert self._recent_k is not None and self._recent_v is not None
        k = torch.cat((self._recent_k[:, :, : self._num_recent], k), dim=2)
        v = torch.cat((self._recent_v[:, :, : self._num_recent], v), dim=2)
        view = self._view(k, v)
        self._keep_recent(k, v, max(0, k.shape[2] - self._min_recent))
        return view

    def _quantize_oldest(self, ready: int) -> None:
        """Quantize as many full groups as fit in the `ready` oldest recent tokens."""
        if ready < self._group:
            return
        assert self._recent_k is not None and self._recent_v is not None
        k, v = (x[:, :, : self._num_recent].clone() for x in (self._recent_k, self._recent_v))
        self._keep_recent(k, v, ready)

    def _keep_recent(self, k: Tensor, v: Tensor, ready: int) -> None:
        """Quantize the full groups among the `ready` oldest of these tokens; the rest is recent.

        Args:
            k, v: all recent tokens, and new ones behind them; none in the recent buffers.
        """
        assert self._recent_k is not None and self._recent_v is not None
        before, count = (self._num_quantized, self._num_recent), ready // self._group * self._group
        rest = k.shape[2] - count
        try:
            self._append_quantized(k[:, :, :count], v[:, :, :count])
            self._recent_k[:, :, :rest] = k[:, :, count:]
            self._recent_v[:, :, :rest] = v[:, :, count:]
            self._num_recent = rest
        except BaseException:  # refused or interrupted: as before
            self._recent_k[:, :, : before[1]] = k[:, :, : before[1]]
            self._recent_v[:, :, : before[1]] = v[:, :, : before[1]]
            self._num_quantized, self._num_recent = before
            raise

    def _append_quantized(self, k: Tensor, v: Tensor) -> None:
        """Quantize full groups and store them after the quantized history."""
        count = k.shape[2]
        if not count:
            return
        check_magnitude(k, v)
        self._make_room(self._num_quantized + count)
        assert self._k is not None and self._v is not None
        tokens = slice(self._num_quantized, self._num_quantized + count)
        groups = slice(tokens.start // self._group, tokens.stop // self._group)
        keys = QuantizedTensor(self._k.qdata[:, :, tokens], *(s[:, :, groups] for s in self._k[1:]))
        values = QuantizedTensor(*(part[:, :, tokens] for part in self._v))
        quantize_keys_into(k, self._with_dtype(keys), bits=self._bits_k, group=self._group)
        v_group = self._v_group(v.shape[3])
        quantize_values_into(v, self._with_dtype(values), bits=self._bits_v, group=v_group)
        unknown = k.isnan().any(-1, keepdim=True) | v.isnan().any(-1, keepdim=True)
        values.offset.masked_fill_(unknown, torch.nan)
        self._num_quantized += count

    def _stored_view(self) -> QuantizedKV:
        """A view of everything stored."""
        assert self._recent_k is not None and self._recent_v is not None
        recent = slice(0, self._num_recent)
        return self._view(self._recent_k[:, :, recent], self._recent_v[:, :, recent])

    def _view(self, recent_k: Tensor, recent_v: Tensor) -> QuantizedKV:
        assert self._k is not None and self._v is not None
        groups = self._num_quantized // self._group
        tokens = slice(0, self._num_quantized)
        keys = (self._k.qdata[:, :, tokens], *(s[:, :, :groups] for s in self._k[1:]))
        values = (part[:, :, tokens] for part in self._v)
        return self._make_view(QuantizedTensor(*keys), QuantizedTensor(*values), recent_k, recent_v)

    def _make_view(
        self, k: QuantizedTensor, v: QuantizedTensor, recent_k: Tensor, recent_v: Tensor
    ) -> QuantizedKV:
        return QuantizedKV(
            k=self._with_dtype(k),
            v=self._with_dtype(v),
            recent_k=recent_k,
            recent_v=recent_v,
            bits_k=self._bits_k,
            bits_v=self._bits_v,
            k_group=self._group,
            hadamard=self._hadamard,
        )

    def _dequantize(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at the positions first .. stop-1 in full precision, still transformed."""
        assert self._recent_k is not None and self._recent_v is not None
        tiles = list(self._stored_view().tiles((KeyRange(first, stop),), max(stop - first, 1)))
        k = [self._recent_k[:, :, :0], *(tile.k for tile in tiles)]
        v = [self._recent_v[:, :, :0], *(tile.v for tile in tiles)]
        return torch.cat(k, dim=2), torch.cat(v, dim=2)

    def _with_dtype(self, x: QuantizedTensor) -> QuantizedTensor:
        """`x` with qdata as float8_e4m3fn under `fp8`; the buffers themselves are uint8."""
        return x._replace(qdata=x.qdata.view(FP8)) if self._fp8 else x

    def _v_group(self, dim: int) -> int:
        return self._group if dim % self._group == 0 else dim

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        if self._k is not None:
            return
        batch, heads, _, dim = k.shape
        value_dim = v.shape[3]
        slots = self._min_recent + 2 * self._group
        self._recent_k = k.new_empty(batch, heads, slots, dim)
        self._recent_v = v.new_empty(batch, heads, slots, value_dim)
        v_groups = value_dim // self._v_group(value_dim)

        def empty(num_bytes: int, scales: int) -> QuantizedTensor:
            qdata, scale, offset = (
                torch.empty(batch, heads, 0, width, dtype=dtype, device=k.device)
                for width, dtype in ((num_bytes, torch.uint8), *[(scales, torch.float16)] * 2)
            )
            return QuantizedTensor(qdata, scale, offset)

        self._k = empty(dim * self._bits_k // 8, dim)
        self._v = empty(value_dim * self._bits_v // 8, v_groups)

    def _make_room(self, tokens: int) -> None:
        assert self._k is not None and self._v is not None
        if tokens <= self._v.qdata.shape[2]:
            return
        step = self.growth_step
        capacity = max(-(-tokens // step) * step, -(-self._reserve // step) * step)
        groups = capacity // self._group
        self._k = QuantizedTensor(
            extended(self._k.qdata, capacity),
            *(extended(s, groups) for s in self._k[1:]),
        )
        self._v = QuantizedTensor(*(extended(part, capacity) for part in self._v))
