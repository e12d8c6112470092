"""A cache in which every KV head of every layer keeps as many keys as it deserves.

A prompt is read into one dense buffer.  `keep` says what stays of it, another number for every
row and head; what stays moves to pages of its head and the buffer is freed.  Slots keep their
positions, so windows, padding and context shift mean what they always mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, dtype_name, expect_tensors
from saccade.cache.dense import DenseCache
from saccade.cache.head_pages import HeadPages, Held
from saccade.core import BadInput, KVView, Unsupported

PAGE_SIZE = 16
"""Half a page a head is left unused, so pages are small."""


class RaggedCache:
    """Every key until `keep` is called, then a different number for every row and KV head.

    Args:
        page_size: keys of a page.
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once for the prompt.
    """

    def __init__(
        self, *, page_size: int = PAGE_SIZE, dtype: torch.dtype | None = None, reserve: int = 0
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}.")
        self._page_size, self._dtype = page_size, dtype
        self._prompt = DenseCache(dtype=dtype, reserve=reserve)
        self._pages: HeadPages | None = None
        self._seen = 0
        self._kept_at = 0  # tokens seen when keys were last given up

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def nbytes(self) -> int:
        return self._prompt.nbytes if self._pages is None else self._pages.nbytes

    @property
    def kv_lens(self) -> Tensor:
        """Keys held of each row and head, int32 `[B, Hkv]`."""
        if self._pages is not None:
            return self._pages.kv_lens
        held = self._prompt.view().k
        return torch.full(held.shape[:2], held.shape[2], dtype=torch.int32, device=held.device)

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store a chunk; see LayerCache."""
        first, self._seen = self._seen, self._seen + k.shape[2]
        if self._pages is None:
            return self._prompt.append(k, v)
        at = torch.arange(first, self._seen, device=k.device)
        self._pages.write(k, v, at[None, None])
        return self._pages.view(self._seen)

    def held(self) -> Held:
        """Everything held, heads side by side; a copy once `keep` was called."""
        if self._pages is not None:
            return self._pages.held()
        view = self._prompt.view()
        at = torch.arange(self._seen, device=view.k.device)
        return Held(view.k, view.v, at.expand(*view.k.shape[:2], -1))

    def keep(self, kept: Tensor) -> None:
        """Keep only some keys and free the memory of the rest.

        Args:
            kept: bool `[B, Hkv, n]` over the columns of `held()`.
        """
        held = self.held()
        self._store(held, kept & (held.positions >= 0))
        self._kept_at = self._seen

    def keep_newest(self, count: int) -> None:
        """Keep the newest `count` keys of every head, which no policy has to score."""
        held = self.held()
        self._store(Held(*(part[:, :, -count:] for part in held)), None)
        self._kept_at = self._seen

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        store = self._prompt if self._pages is None else self._pages
        store.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            Unsupported: `length` lies before the tokens that `keep` chose among.
        """
        if length >= self._seen:
            return
        if length < self._kept_at:
            raise Unsupported(
                f"this cache was compressed when it had read {self._kept_at} tokens, so it cannot "
                f"go back to position {length}: what was forgotten would have to come back."
            )
        if self._pages is None:
            self._prompt.truncate(length)
        else:
            self._pages.forget_newest(self._seen - length)
        self._seen = length

    def max_rollback(self, length: int) -> int:
        """Any position behind the last compression."""
        return min(length, self._seen) if length >= self._kept_at else 0

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Forget positions start .. stop-1; later keys move down, re-rotated."""
        moved = stop - start
        if self._pages is None:
            self._prompt.context_shift(start, stop, shift)
        else:
            k, v, at = self._pages.held()
            later = at >= stop
            k = torch.where(later[..., None], shift(k, -moved), k)
            kept = ((at < start) | later) & (at >= 0)
            self._store(Held(k, v, torch.where(later, at - moved, at)), kept)
            self._kept_at = max(min(start, self._kept_at), self._kept_at - moved)
        self._seen -= moved

    def reset(self) -> None:
        """Forget everything; the buffer of a prompt stays allocated, pages are freed."""
        self._prompt.reset()
        self._pages, self._seen, self._kept_at = None, 0, 0

    def state(self) -> CacheState:
        """See LayerCache; heads are written side by side, shorter ones filled up."""
        settings = {"page_size": self._page_size, "dtype": dtype_name(self._dtype)}
        progress = {"seen": self._seen, "kept_at": self._kept_at, "pages": 0}
        if self._pages is None:
            dense = self._prompt.state()
            progress["capacity"] = dense.progress["capacity"]
            return CacheState(settings, progress, dense.tensors)
        progress |= {"pages": self._pages.num_pages, "capacity": 0}
        return CacheState(settings, progress, self._pages.held()._asdict())

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; as many pages are allocated as were."""
        told = state.progress
        self.reset()
        if not told["pages"]:
            dense = {"seen": told["seen"], "slots": told["seen"], "capacity": told["capacity"]}
            self._prompt.restore(CacheState({}, dense, state.tensors), device)
        else:
            held = Held(*(state.tensors[name].to(device) for name in Held._fields))
            length = held.k.shape[2]
            expect_tensors(state, {"k": length, "v": length})
            if held.positions.shape != held.k.shape[:3]:
                raise BadInput("the saved cache contradicts itself: its keys lack positions.")
            self._store(held, held.positions >= 0)
            assert self._pages is not None
            self._pages.grow(told["pages"])
        self._seen, self._kept_at = told["seen"], told["kept_at"]

    def _store(self, held: Held, kept: Tensor | None) -> None:
        """Hold these keys (None: all) in fresh pages, as many as they need, and nothing else."""
        self._pages = HeadPages(held.k, held.v, self._page_size)
        self._pages.write(*held, kept)
        self._prompt = DenseCache(dtype=self._dtype)
