"""Keys and values in pages of a pool: many sequences, shared prefixes, nothing ever moved.

`pages.Pages` decides which page belongs to whom; here are the tensors.  A pool of a fixed size
refuses when it is full; one that may grow does so by a sixteenth, like a dense cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys, dtype_name, expect_tensors
from saccade.cache.pages import Copy, Pages
from saccade.core import PagedKV, Unsupported
from saccade.core.kv import dense

PAGE_SIZE = 64
GROWTH_SHARE = 16


class PagePool:
    """Keys and values of one layer for any number of sequences.

    `pool.pages` is the bookkeeping: `create` (what of a prompt is there already), `fork`,
    `truncate`, `release`; the pool writes into its sequences and lends views of them:

        row = pool.pages.create(prompt)
        start = pool.pages.length(row)                  # found again: need not be computed
        pool.write([row], k[:, :, start:], v[:, :, start:], prompt[start:])
        other = pool.pages.fork(row)                    # shares every page until one writes
        attend(q, pool.view([row, other]), mask=Mask())

    Args:
        num_pages: pages to allocate.
        page_size: tokens of a page.
        grows: allocate more when it is full, instead of refusing.
        dtype: storage type; None keeps that of the keys.
    """

    def __init__(
        self,
        num_pages: int = 0,
        *,
        page_size: int = PAGE_SIZE,
        grows: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.pages = Pages(num_pages, page_size)
        self.dtype, self._grows = dtype, grows
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whoever uses them."""
        return 0 if self._k is None or self._v is None else self._k.nbytes + self._v.nbytes

    def write(
        self, rows: Sequence[int], k: Tensor, v: Tensor, tokens: Sequence[int] | None = None
    ) -> None:
        """Append keys `[B, Hkv, t, D]` and values to B sequences of one length.

        Args:
            rows: ids of `pages.create` or `pages.fork`.
            k, v: the new keys and values.
            tokens: what was read, where B is 1 and a later prompt may begin with the same.

        Raises:
            Unsupported: the pool is full and may not grow; nothing has changed then.
        """
        count, size = k.shape[2], self.pages.page_size
        self._make_room(rows, k, v)
        start = self.pages.length(rows[0])
        assert all(self.pages.length(row) == start for row in rows), "rows of one length"
        # One after the other, copies at once: a page that was shared by two rows of the batch is
        # copied for the first and written in place by the last.
        for row in rows:
            self._copy(self.pages.extend(row, count, tokens))
        assert self._k is not None and self._v is not None
        at = torch.arange(start, start + count, device=k.device)
        lists = [self.pages.table(row) for row in rows]
        holding = [[pages[i // size] for i in range(start, start + count)] for pages in lists]
        pages = torch.tensor(holding, dtype=torch.int64, device=k.device)  # [B, t]
        self._k[pages, :, at % size] = k.transpose(1, 2).to(self._k.dtype)
        self._v[pages, :, at % size] = v.transpose(1, 2).to(self._v.dtype)

    def view(self, rows: Sequence[int], table: Tensor | None = None) -> PagedKV:
        """What some sequences hold, without a copy; they may differ in length.

        Args:
            rows: ids of the sequences.
            table: their `table`, where the caller still has it.
        """
        assert self._k is not None and self._v is not None
        kv_lens = [self.pages.length(row) for row in rows]
        return PagedKV(
            self._k,
            self._v,
            self.table(rows, self._k.device) if table is None else table,
            torch.tensor(kv_lens, dtype=torch.int32, device=self._k.device),
            max(kv_lens),
        )

    def table(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Pages of each sequence, int32 `[B, most pages]`, 0 behind the end."""
        lists = [self.pages.table(row) for row in rows]
        most = max(map(len, lists))
        padded = [pages + [0] * (most - len(pages)) for pages in lists]
        return torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), most)

    def _make_room(self, rows: Sequence[int], k: Tensor, v: Tensor) -> None:
        pages = self.pages
        missing = pages.needed(rows, k.shape[2]) - pages.num_available
        if missing > 0 and self._grows:
            have = pages.num_pages
            pages.grow(have + max(missing, have // GROWTH_SHARE))
        pages.check_room(rows, k.shape[2])
        self._k, self._v = self._grown(self._k, k), self._grown(self._v, v)

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        heads, dim = like.shape[1], like.shape[3]
        have = 0 if old is None else old.shape[0]
        if old is not None and have == self.pages.num_pages:
            return old
        shape = (self.pages.num_pages, heads, self.pages.page_size, dim)
        new = torch.empty(shape, dtype=self.dtype or like.dtype, device=like.device)
        if old is not None:
            new[:have] = old
        return new

    def _copy(self, copies: list[Copy]) -> None:
        assert self._k is not None and self._v is not None
        for source, target in copies:
            self._k[target] = self._k[source]
            self._v[target] = self._v[source]


class PagedCache:
    """The rows of a batch as sequences of a pool; see LayerCache.

    Rows that are reordered share their pages until they differ, so beams cost what they do not
    have in common.

    Args:
        pool: of this layer, shared with other caches; default one of its own that grows.
        page_size: tokens of a page of its own pool; dtype: its storage type.
    """

    def __init__(
        self,
        pool: PagePool | None = None,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.pool = pool or PagePool(page_size=page_size, grows=True, dtype=dtype)
        self._rows: list[int] = []
        self._seen = 0
        self._expected: list[int] = []
        self._listed: list[list[int]] = []  # pages of each row, as `_table` has them
        self._table: Tensor | None = None

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, and of the table of these rows."""
        return self.pool.nbytes + (0 if self._table is None else self._table.nbytes)

    def append(self, k: Tensor, v: Tensor) -> PagedKV:
        """Store a chunk; see LayerCache."""
        if not self._rows:
            self._rows = [self.pool.pages.create() for _ in range(k.shape[0])]
        stop = self._seen + k.shape[2]
        told = len(self._rows) == 1 and stop <= len(self._expected)
        self.pool.write(self._rows, k, v, self._expected[self._seen : stop] if told else None)
        self._seen = stop
        return self.view()

    def expect(self, tokens: Sequence[int]) -> int:
        """Say what an empty cache of one row will read, to share pages with others of the pool.

        Args:
            tokens: of the prompt, without the last one where its logits are wanted.

        Returns:
            How many of them it holds already, found in the pool; append those after.

        Raises:
            Unsupported: the cache is not empty.
        """
        if self._rows:
            raise Unsupported(f"this cache holds {self._seen} tokens already: reset it first.")
        self._expected = list(tokens)
        self._rows = [self.pool.pages.create(self._expected)]
        self._seen = self.pool.pages.length(self._rows[0])
        return self._seen

    def fork(self) -> PagedCache:
        """A cache that shares all pages with this one until one of them writes."""
        other = PagedCache(self.pool)
        other._rows = [self.pool.pages.fork(row) for row in self._rows]
        other._seen, other._expected = self._seen, list(self._expected)
        return other

    def view(self) -> PagedKV:
        """Everything held, without a copy."""
        pages = self.pool.pages
        lists = [pages.table(row) for row in self._rows]
        if self._table is None or lists != self._listed:  # most steps stay in their last page
            self._listed = [list(row) for row in lists]
            self._table = None
        view = self.pool.view(self._rows, self._table)
        self._table = view.table
        return view

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i], without copying a page."""
        old = self._rows
        self._rows = [self.pool.pages.fork(old[i]) for i in rows.tolist()] if old else []
        self._release(old)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on; their pages are free for others."""
        for row in self._rows:
            self.pool.pages.truncate(row, length)
        self._seen = min(self._seen, length)
        del self._expected[length:]

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self._seen)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Forget positions start .. stop-1; later keys are written again, re-rotated."""
        held = dense(self.view())
        k, v = shift(held.k[:, :, stop:], start - stop), held.v[:, :, stop:].clone()
        self.truncate(start)
        self.append(k, v)

    def reset(self) -> None:
        """Forget everything; the pool stays allocated."""
        self._release(self._rows)
        self._rows, self._seen, self._expected = [], 0, []
        self._table = None

    def state(self) -> CacheState:
        """See LayerCache; the tensors are gathered from the pages."""
        tensors: dict[str, Tensor] = {}
        if self._seen:
            held = dense(self.view())
            tensors = {"k": held.k, "v": held.v}
        settings = {"page_size": self.pool.pages.page_size, "dtype": dtype_name(self.pool.dtype)}
        return CacheState(settings, {"seen": self._seen}, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        seen = state.progress["seen"]
        expect_tensors(state, {"k": seen, "v": seen})
        self.reset()
        if state.tensors:
            self.append(state.tensors["k"].to(device), state.tensors["v"].to(device))

    def _release(self, rows: list[int]) -> None:
        for row in rows:
            self.pool.pages.release(row)
