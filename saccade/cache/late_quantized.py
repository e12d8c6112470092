"""A cache that a policy compresses and that is quantized then: first fewer keys, then fewer bits.

A policy scores keys as they are, so a prompt is read into a dense buffer.  `keep` moves the chosen
keys into a quantized cache, to which later tokens are appended, and frees the buffer.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, check_length, check_not_removed
from saccade.cache.dense import DenseCache
from saccade.cache.placing import Placement, PlacingCache
from saccade.cache.quantized import QuantizedCache
from saccade.core import KVView, Unsupported


class LateQuantizedCache(PlacingCache):
    """Every key as it was given until `keep` is called, then chosen and later keys in 8 or 4 bits.

    The view counts slots, as that of a compressed DenseCache does.

    Args:
        bits_k, bits_v, fp8: see QuantizedFormat.
        reserve: slots to allocate at once for the prompt.
    """

    def __init__(
        self, *, bits_k: int = 8, bits_v: int = 8, fp8: bool = False, reserve: int = 0
    ) -> None:
        self.quantized = partial(QuantizedCache, bits_k=bits_k, bits_v=bits_v, fp8=fp8)
        self._prompt = DenseCache(reserve=reserve)
        self._store: QuantizedCache | None = None
        self._seen = self._compressed_at = 0

    @property
    def prompt(self) -> DenseCache:
        """The buffer of everything appended before `keep`."""
        return self._prompt

    @property
    def seen(self) -> int:
        """Tokens appended so far, removed ones included."""
        return self._seen

    @property
    def num_slots(self) -> int:
        """Keys stored."""
        return self._prompt.num_slots if self._store is None else self._store.seen

    @property
    def is_compressed(self) -> bool:
        """Whether keys were removed, so that slots no longer are positions."""
        return self.num_slots != self._seen

    @property
    def is_quantized(self) -> bool:
        """Whether `keep` was called."""
        return self._store is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt's buffer, or of the quantized cache."""
        return self._current.nbytes

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store a chunk; see LayerCache."""
        if self._store is None:
            self._prompt.truncate(self._seen)  # what an interrupted append left
        view = self._current.append(k, v)
        self._seen += k.shape[2]
        return view

    def given(self) -> tuple[Tensor, Tensor]:
        """All stored keys `[B, Hkv, slots, D]` and values, dequantized after `keep`."""
        if self._store is None:
            view = self._prompt.view()
            return view.k, view.v
        return self._store.given(0, self._store.seen)

    def keep(self, index: Tensor, *, room: int = 0) -> None:
        """Keep only the slots `index` int64 `[B, Hkv, n]` (ascending), quantized; free the rest.

        Args:
            room: slots to allocate beyond them for what comes next.
        """
        k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in self.given())
        dtype = self._dtype
        store = self.quantized(reserve=index.shape[2] + room)
        store.append(k.to(dtype), v.to(dtype))
        self._store, self._prompt = store, DenseCache()
        self._compressed_at = self._seen

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache."""
        if self._store is None:
            self._prompt.truncate(self._seen)
        return self._current.place(count, dtype)

    def storage(self) -> KVView:
        """See PlacingCache."""
        return self._current.storage()

    def commit(self, count: int) -> None:
        """See PlacingCache."""
        self._current.commit(count)
        self._seen += count

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        self._current.reorder(rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Raises:
            Unsupported: `length` lies before the last compression, whose keys are gone.
        """
        check_length(length)
        check_not_removed(length, self._compressed_at)
        count = max(0, self._seen - length)
        self._current.truncate(self.num_slots - count)
        self._seen -= count

    def max_rollback(self, length: int) -> int:
        """Any position from the last `keep` on."""
        return min(length, self._seen) if length >= self._compressed_at else 0

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1 of a prompt; refused once keys were removed."""
        if self.is_compressed:
            raise Unsupported(
                "a compressed cache cannot be shifted: its positions have gaps. Leave n_keep unset."
            )
        self._current.context_shift(start, stop, shift)
        self._seen = self.num_slots
        self._compressed_at = 0 if self._store is None else min(start, self._compressed_at)

    def reset(self) -> None:
        """Remove everything; the buffer of a prompt stays allocated, quantized storage is freed."""
        self._prompt.reset()
        self._store, self._seen, self._compressed_at = None, 0, 0

    def state(self) -> CacheState:
        """See LayerCache."""
        inner = self._current.state()
        settings = self.quantized().state().settings
        progress = {"seen": self._seen, "compressed_at": self._compressed_at, "late": 0}
        progress |= {"slots": self.num_slots, "filled": 0, "capacity": inner.progress["capacity"]}
        if self._store is not None:
            progress |= {"late": 1, "filled": inner.progress["quantized"]}
        return CacheState(settings, progress, inner.tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        saved, slots = state.progress, state.progress["slots"]
        self.reset()
        inner = {"capacity": saved["capacity"]}
        if saved["late"]:
            inner |= {"quantized": saved["filled"], "recent": slots - saved["filled"]}
            store = self.quantized()
            store.restore(CacheState(state.settings, inner, state.tensors), device)
            self._store, self._prompt = store, DenseCache()
        else:
            inner |= {"seen": slots, "slots": slots}
            self._prompt.restore(CacheState({}, inner, state.tensors), device)
        self._seen, self._compressed_at = saved["seen"], saved["compressed_at"]

    @property
    def _current(self) -> DenseCache | QuantizedCache:
        return self._prompt if self._store is None else self._store

    @property
    def _dtype(self) -> torch.dtype:
        """Of the keys as they were given."""
        if self._store is not None:
            return self._store.recent.parts[0].dtype
        return self._prompt.view().k.dtype
