"""A cache in which every KV head of every layer keeps its own number of keys (Ada-KV).

A prompt is read into one dense buffer.  `keep` selects keys, a different number for every row and
head; the selected keys move to pages of their head and the buffer is freed.  Slots store the
positions of their keys, so windows, padding and context shift work as on dense keys.

Source: Feng et al., Ada-KV, 2024 (arXiv 2407.11550).
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
    dtype_name,
    expect_tensors,
)
from saccade.cache.dense import DenseCache
from saccade.cache.per_head_pages import GatheredKV, PerHeadPages
from saccade.cache.placing import Placement, PlacingCache
from saccade.core import BadInput, KVView, RaggedKV, Unsupported

PAGE_SIZE = 16
"""Small, because on average half a page a head stays unused."""


class RaggedCache(PlacingCache):
    """Every key until `keep` is called, then a different number for every row and KV head.

    Args:
        page_size: keys of a page.
        dtype: storage type; None keeps that of the keys.
        reserve: slots to allocate at once for the prompt.

    Raises:
        ValueError: page_size below 1.
    """

    def __init__(
        self, *, page_size: int = PAGE_SIZE, dtype: torch.dtype | None = None, reserve: int = 0
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}.")
        self._page_size, self._dtype = page_size, dtype
        self._prompt = DenseCache(dtype=dtype, reserve=reserve)
        self._pages: PerHeadPages | None = None
        self._seen = 0
        self._compressed_at = 0  # tokens seen when keys were last removed

    @property
    def seen(self) -> int:
        """Tokens appended so far, removed ones included."""
        return self._seen

    @property
    def page_size(self) -> int:
        """Keys of a page."""
        return self._page_size

    @property
    def is_compressed(self) -> bool:
        """Whether `keep` was called, so that heads have pages of their own."""
        return self._pages is not None

    @property
    def prompt(self) -> DenseCache:
        """The buffer of everything appended before `keep`."""
        return self._prompt

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt buffer, or of pages, positions and page tables."""
        return self._prompt.nbytes if self._pages is None else self._pages.nbytes

    @property
    def kv_lens(self) -> Tensor:
        """Keys stored of each row and head, int32 `[B, Hkv]`."""
        if self._pages is not None:
            return self._pages.kv_lens
        k = self._prompt.view().k
        return torch.full(k.shape[:2], k.shape[2], dtype=torch.int32, device=k.device)

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store a chunk; see LayerCache."""
        check_append(k, v, *(self._like() if self._seen else (None, None)))
        first, stop = self._seen, self._seen + k.shape[2]
        if self._pages is None:
            self._prompt.truncate(first)  # what an interrupted append left
            view = self._prompt.append(k, v)
            self._seen = stop
            return view
        self._pages.write(k, v, torch.arange(first, stop, device=k.device)[None, None])
        self._seen = stop
        return self._pages.view(stop)

    def place(self, count: int, dtype: torch.dtype) -> Placement | None:
        """See PlacingCache; every head has a slot of its own, which page tables and lengths say."""
        if self._pages is None:
            self._prompt.truncate(self._seen)
            return self._prompt.place(count, dtype)
        self._pages.place(count)
        return Placement(self._pages.storage(), 0, self._seen)

    def storage(self) -> KVView:
        """See PlacingCache."""
        if self._pages is None:
            return self._prompt.storage()
        return RaggedKV(*self._pages.storage(), self._seen, int(self._pages.kv_lens.max()))

    def commit(self, count: int) -> None:
        """See PlacingCache."""
        store = self._prompt if self._pages is None else self._pages
        store.commit(count)
        self._seen += count

    def gather(self) -> GatheredKV:
        """Everything stored, one column for each key; a copy once `keep` was called."""
        if self._pages is not None:
            return self._pages.gather()
        view = self._prompt.view()
        at = torch.arange(self._seen, device=view.k.device)
        return GatheredKV(view.k, view.v, at.expand(*view.k.shape[:2], -1))

    def keep(self, kept: Tensor) -> None:
        """Keep some keys and free the memory of the rest.

        Args:
            kept: bool `[B, Hkv, n]` over the columns of `gather()`.
        """
        gathered = self.gather()
        self._store(gathered, kept & (gathered.positions >= 0))
        self._compressed_at = self._seen

    def keep_newest(self, count: int) -> None:
        """Keep the newest `count` keys of every head, for which no policy is needed."""
        gathered = self.gather()
        self._store(GatheredKV(*(part[:, :, -count:] for part in gathered)), None)
        self._compressed_at = self._seen

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._seen:
            check_rows(rows, self.kv_lens.shape[0])
        store = self._prompt if self._pages is None else self._pages
        store.reorder(rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on.

        Raises:
            Unsupported: `length` lies before the last compression, whose keys are gone.
        """
        check_length(length)
        if length >= self._seen:
            return
        if length < self._compressed_at:
            raise Unsupported(
                f"this cache was compressed when it had read {self._compressed_at} tokens, so it "
                f"cannot go back to position {length}: removed keys are gone. "
                "Reset it and read the prompt again."
            )
        if self._pages is None:
            self._prompt.truncate(length)
        else:
            self._pages.remove_newest(self._seen - length)
        self._seen = length

    def max_rollback(self, length: int) -> int:
        """Any position from the last compression on."""
        return min(length, self._seen) if length >= self._compressed_at else 0

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys move down, re-rotated."""
        check_shift(start, stop, self._seen)
        moved = stop - start
        if self._pages is None:
            self._prompt.context_shift(start, stop, shift)
        else:
            k, v, at = self._pages.gather()
            later = at >= stop
            k = torch.where(later[..., None], shift(k, -moved), k)
            kept = ((at < start) | later) & (at >= 0)
            self._store(GatheredKV(k, v, torch.where(later, at - moved, at)), kept)
            self._compressed_at = max(min(start, self._compressed_at), self._compressed_at - moved)
        self._seen -= moved

    def reset(self) -> None:
        """Remove everything; the buffer of a prompt stays allocated, pages are freed."""
        self._prompt.reset()
        self._pages, self._seen, self._compressed_at = None, 0, 0

    def state(self) -> CacheState:
        """See LayerCache; pages are gathered, heads with fewer keys padded (GatheredKV)."""
        settings = {"page_size": self._page_size, "dtype": dtype_name(self._dtype)}
        progress = {"seen": self._seen, "compressed_at": self._compressed_at, "pages": 0}
        if self._pages is None:
            dense = self._prompt.state()
            progress["capacity"] = dense.progress["capacity"]
            return CacheState(settings, progress, dense.tensors)
        progress |= {"pages": self._pages.num_pages, "capacity": 0}
        return CacheState(settings, progress, self._pages.gather()._asdict())

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache; as many pages are allocated as the saved cache had."""
        saved = state.progress
        self.reset()
        if not saved["pages"]:
            dense = {"seen": saved["seen"], "slots": saved["seen"], "capacity": saved["capacity"]}
            self._prompt.restore(CacheState({}, dense, state.tensors), device)
        else:
            tensors = (state.tensors[name].to(device) for name in GatheredKV._fields)
            gathered = GatheredKV(*tensors)
            length = gathered.k.shape[2]
            expect_tensors(state, {"k": length, "v": length})
            if gathered.positions.shape != gathered.k.shape[:3]:
                raise BadInput("the saved cache contradicts itself: its keys lack positions.")
            self._store(gathered, gathered.positions >= 0)
            assert self._pages is not None
            self._pages.grow(saved["pages"])
        self._seen, self._compressed_at = saved["seen"], saved["compressed_at"]

    def _like(self) -> tuple[Tensor | None, Tensor | None]:
        """Tensors with the sizes of what is stored; None where nothing was."""
        if self._pages is not None:
            return self._pages.like
        return self._prompt.like

    def _store(self, gathered: GatheredKV, kept: Tensor | None) -> None:
        """Replace what is stored by the kept columns (None: all), in as few pages as possible."""
        self._pages = PerHeadPages(gathered.k, gathered.v, self._page_size)
        self._pages.write(*gathered, kept)
        self._prompt = DenseCache(dtype=self._dtype)
