"""A cache in int8, int4 or fp8, the newest tokens in 16 bits (KIVI, arXiv 2402.02750).

Keys are quantized per channel in groups of tokens, values per token; the newest tokens wait in 16
bits until a full group of them can be quantized.  `hadamard_transform` is applied to keys and
values first, which spreads outlier channels (QuaRot, arXiv 2404.00456); the operator applies it to
queries and output.  Kernels dequantize tile by tile; no dequantized copy of the history exists.

Numbers beyond float16 are refused, since scales and offsets are float16.  A token with a NaN in its
key or value (padding may hold anything) changes no other token; a query that does attend to it gets
NaN, as without quantization: the token's value is stored as NaN.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

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
)
from saccade.cache.magnitude import check_magnitude
from saccade.cache.placing import Placement, PlacingCache
from saccade.cache.quantized_groups import STEPPING_ROOM, QuantizedFormat, QuantizedGroups
from saccade.cache.recent_tokens import RecentTokens
from saccade.cache.step import Cursor, StepView
from saccade.cache.summaries import SummarizingCache
from saccade.core import GrowingKV, KeyRange, KVView, QuantizedKV, Unsupported
from saccade.core.formats import QuantizedTensor
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.kv_write.records import KVSlots, PendingRope


class QuantizedCache(PlacingCache, SummarizingCache):
    """Keys and values in 8 or 4 bits; see LayerCache.

    Args:
        bits_k, bits_v, group, hadamard, fp8: see QuantizedFormat.
        recent: newest tokens that stay in 16 bits, at least.
        reserve: tokens to allocate for at once, when the final length is known.

    Raises:
        ValueError: what QuantizedFormat refuses, or recent below 0.
    """

    def __init__(
        self,
        *,
        bits_k: int = 8,
        bits_v: int = 8,
        group: int = 64,
        recent: int = 8,
        hadamard: bool = True,
        fp8: bool = False,
        reserve: int = 0,
    ) -> None:
        if recent < 0:
            raise ValueError(f"recent must be >= 0, got {recent}.")
        self.fmt = QuantizedFormat(bits_k, bits_v, group, hadamard, fp8)
        self.least_recent, self.reserved = recent, reserve
        self.groups = QuantizedGroups(self.fmt, reserve - recent)
        self.recent = RecentTokens(recent + group)
        self._first = 0  # position of the oldest token of the groups
        self._counts: Tensor | None = None  # int64 [2], read by captured steps; see _sync
        self._synced = (-1, -1)  # what was written to them last

    @property
    def seen(self) -> int:
        """Tokens appended so far."""
        return self._newest + self.recent.length

    @property
    def nbytes(self) -> int:
        """Bytes of quantized storage, scales, offsets, the newest tokens and summaries."""
        counts = () if self._counts is None else (self._counts,)
        stored = sum(part.nbytes for part in (*self.groups.parts, *self.recent.parts, *counts))
        return stored + (0 if self.summaries is None else self.summaries.nbytes)

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store a chunk; see LayerCache.  The view holds several new tokens as they were given."""
        if not self.seen and not self.recent.fits(k, v):
            self._free()  # another batch
        check_append(k, v, *(self.recent.parts or (None, None)))
        k, v = self._as_stored(k, v)
        self.groups.allocate(k, v)
        self.recent.allocate(k, v)
        self._quantize_oldest(self.recent.length - self.least_recent)
        if self._stores_as_given(k.shape[2], k.dtype):
            self.recent.append(k, v)
            view = self._view(*self.recent.filled)
        else:
            view = self._append_large(k, v)
        self.summarize()
        return view

    def lasting(self) -> tuple[int, int]:
        """See SummarizingCache; the newest tokens change once more, when they are quantized."""
        return self.groups.length, self.groups.capacity

    def keys(self, start: int, stop: int) -> Tensor:
        """See SummarizingCache."""
        return self.given(start, stop)[0].to(self.recent.parts[0].dtype)

    def reserve(self, count: int) -> None:
        """See SteppingCache; full groups are quantized here, between two steps."""
        if not self.recent.parts:
            raise Unsupported("an empty cache cannot be stepped: read a prompt first.")
        self._quantize_oldest(self.recent.length - self.least_recent)
        room = self.recent.most - self.recent.length
        if count > room:
            raise Unsupported(
                f"a quantized cache takes up to {room} tokens a step, not {count}. Append them."
            )
        if self.recent.parts[0].is_cuda:  # where steps are captured
            self.groups.make_room(self.groups.length + self.fmt.group, more=STEPPING_ROOM)
            self.recent.stay()
        self.recent.make_room(self.recent.length + count)
        self._sync()

    def graph_key(self) -> tuple[int, ...]:
        """See SteppingCache."""
        assert self._counts is not None, "reserve comes first"
        tensors = *self.groups.parts, *self.recent.parts, *self._counts.chunk(2)
        return *(x.data_ptr() for x in tensors), self.groups.capacity, self.recent.slots

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """See SteppingCache; new tokens are written to the recent buffer."""
        assert self._counts is not None, "reserve comes first"
        quantized, newest = self._counts.chunk(2)
        recent = KVSlots(*self.recent.buffers, cursor.start, newest, self.fmt.hadamard)
        q = append(recent, k, v, rope)
        view = GrowingKV(self.groups.whole_view(*self.recent.buffers), quantized)
        return StepView(view, self._in_view(cursor), q)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache; full groups are quantized here."""
        if not self.seen:
            return None
        self._quantize_oldest(self.recent.length - self.least_recent)
        if not self._stores_as_given(count, dtype):
            return None
        slot = self.recent.length
        self.recent.make_room(slot + count)
        parts = *self.recent.parts, *self.groups.parts
        return Placement(parts, slot, self.groups.length + slot).summarized(self)

    def storage(self) -> QuantizedKV:
        """See PlacingCache."""
        return self.groups.whole_view(*self.recent.buffers)

    def commit(self, count: int) -> None:
        """See SteppingCache."""
        self.recent.length += count

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self.recent.parts:
            check_rows(rows, self.recent.parts[0].shape[0])
        self.groups.reorder(rows)
        self.recent.reorder(rows)
        if self.summaries is not None:
            self.summaries.reorder(rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Where that cuts a quantized group, the rest of the group is dequantized into the recent
        buffer; its quantization error stays.
        """
        check_length(length)
        if length >= self._newest:
            self.recent.length = min(self.recent.length, length - self._newest)
            return
        first = self._first + self.fmt.whole(length - self._first)
        k, v = self._dequantize(first, length)
        self.groups.length = first - self._first
        self.recent.replace(k, v)
        self.cut_summaries(self.groups.length)

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self.seen)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated and quantized again.

        Quantizing once more adds about as much error as the first time.  Meanwhile the tokens from
        `start` on are in full precision, in this one layer.
        """
        check_shift(start, stop, self.seen)
        k, v = self.given(stop, self.seen)
        self.truncate(start)
        self.append(shift(k, start - stop), v)

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        self.groups.length = self.recent.length = 0
        self.cut_summaries(0)

    def state(self) -> CacheState:
        """See LayerCache."""
        settings = asdict(self.fmt) | {"recent": self.least_recent}
        progress = {"quantized": self.groups.length, "recent": self.recent.length}
        progress["capacity"] = self.groups.capacity
        if not self.recent.parts:
            return CacheState(settings, progress, {})
        view = self.groups.view(*self.recent.filled)
        parts = {f"k.{name}": x for name, x in view.k._asdict().items()}
        parts |= {f"v.{name}": x for name, x in view.v._asdict().items()}
        parts |= {"recent.k": view.recent_k, "recent.v": view.recent_v}
        return CacheState(settings, progress, parts)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        expect_tensors(state, self._saved_lengths(state))
        self._free()
        self._counts, self._synced = None, (-1, -1)
        if not state.tensors:
            return
        parts = {name: x.to(device) for name, x in state.tensors.items()}
        parts |= {name: parts[name].view(torch.uint8) for name in ("k.qdata", "v.qdata")}
        names = ("qdata", "scale", "offset")
        keys, values = (QuantizedTensor(*(parts[f"{x}.{n}"] for n in names)) for x in "kv")
        self.groups.restore(keys, values, self.fmt.whole(state.progress["capacity"]))
        self.recent.restore(parts["recent.k"], parts["recent.v"])
        self.summarize()

    def _saved_lengths(self, state: CacheState) -> dict[str, int]:
        """How many tokens each tensor of a saved state holds."""
        quantized, recent = state.progress["quantized"], state.progress["recent"]
        scales = quantized // self.fmt.group
        lengths = {"k.qdata": quantized, "k.scale": scales, "k.offset": scales}
        lengths |= dict.fromkeys(("v.qdata", "v.scale", "v.offset"), quantized)
        return lengths | {"recent.k": recent, "recent.v": recent}

    @property
    def _newest(self) -> int:
        """Position of the first recent token."""
        return self._first + self.groups.length

    def _free(self) -> None:
        """Remove everything, memory included."""
        self.groups.free()
        self.recent.free()
        self.cut_summaries(0)

    def _as_stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values, transformed; refused where float16 does not hold them."""
        if self.fmt.hadamard:
            k, v = hadamard_transform(k), hadamard_transform(v)
        if k.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
            check_magnitude(k, v, least=k.dtype == torch.float16)
        return k, v

    def _sync(self) -> None:
        """Write the counts that captured steps read: quantized tokens, and the first recent one."""
        if self._counts is None:
            device = self.recent.parts[0].device
            self._counts = torch.empty(2, dtype=torch.int64, device=device)
        counts = self.groups.length, self._newest
        if self._synced != counts:
            for at, count in enumerate(counts):
                self._counts[at].fill_(count)
            self._synced = counts

    def _in_view(self, cursor: Cursor) -> Cursor:
        """The cursor of a step in the positions of its view."""
        return cursor

    def _stores_as_given(self, count: int, dtype: torch.dtype) -> bool:
        """Whether the recent buffer takes new tokens: as they are, or a single one rounded."""
        fits = self.recent.length + count <= self.recent.most
        return fits and (count == 1 or dtype == self.recent.parts[0].dtype)

    def _append_large(self, k: Tensor, v: Tensor) -> KVView:
        """Append tokens that the recent buffer does not hold as they are; exact in the view."""
        old_k, old_v = self.recent.filled
        k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        view = self._lasting_view(k, v)
        self._keep_recent(k, v, k.shape[2] - self.least_recent)
        return view

    def _quantize_oldest(self, ready: int) -> None:
        """Quantize as many full groups as fit in the `ready` oldest recent tokens."""
        if ready >= self.fmt.group:
            k, v = self.recent.filled
            self._keep_recent(k.clone(), v.clone(), ready)

    def _keep_recent(self, k: Tensor, v: Tensor, ready: int) -> None:
        """Quantize the full groups among the `ready` oldest of these tokens; the rest is recent.

        Args:
            k, v: all recent tokens, and new ones behind them; none in the recent buffers.
        """
        count, waiting, held = self.fmt.whole(ready), self.recent.length, self._held()
        following = self._newest + k.shape[2]
        try:
            self._quantize(k[:, :, :count], v[:, :, :count], following)
            self.recent.replace(k[:, :, count:], v[:, :, count:])
        except BaseException:  # refused or interrupted: as before
            self._put_back(held)
            self.recent.replace(k[:, :, :waiting], v[:, :, :waiting])
            raise

    def _held(self) -> Any:
        """What `_put_back` needs to undo `_quantize`."""
        return self.groups.length

    def _put_back(self, held: Any) -> None:
        self.groups.length = held

    def _quantize(self, k: Tensor, v: Tensor, following: int) -> None:
        """Quantize full groups of tokens, the oldest that are not.

        Args:
            following: position of the next token.
        """
        self.groups.append(k, v)

    def _view(self, recent_k: Tensor, recent_v: Tensor) -> KVView:
        return self._quantized_view(recent_k, recent_v)

    def _lasting_view(self, recent_k: Tensor, recent_v: Tensor) -> KVView:
        """A view that stays valid while groups are quantized."""
        return self._view(recent_k, recent_v)

    def _quantized_view(self, recent_k: Tensor, recent_v: Tensor) -> QuantizedKV:
        return self.groups.view(recent_k, recent_v, first=self._first)

    def _dequantize(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Stored keys and values at the positions start .. stop-1, float32, still transformed."""
        none_k, none_v = (x[:, :, :0].float() for x in self.recent.filled)
        view = self._quantized_view(*(x.float() for x in self.recent.filled))
        tiles = list(view.tiles((KeyRange(start, stop),), max(stop - start, 1)))
        k = torch.cat([none_k, *(tile.k for tile in tiles)], dim=2)
        return k, torch.cat([none_v, *(tile.v for tile in tiles)], dim=2)

    def given(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same as they were given to the cache, up to what quantizing has changed."""
        k, v = self._dequantize(start, stop)
        return (hadamard_transform(k), hadamard_transform(v)) if self.fmt.hadamard else (k, v)
