"""Keys and values in pages of a pool: many sequences, shared prefixes, no key is ever moved.

`page_allocator.PageAllocator` keeps the page tables; the tensors are here.  A pool of a fixed size
refuses when it is full; one that may grow does so by a sixteenth, like a dense cache.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from saccade.cache.page_allocator import PageAllocator, PageCopy, grown_pages
from saccade.cache.summaries import SummarizingCache
from saccade.core import KeyRange, PagedKV, Unsupported
from saccade.core.kv import dense, joined

PAGE_SIZE = 64


class PagePool:
    """Keys and values of one layer for any number of sequences.

    `pool.allocator` creates, forks, truncates and releases sequences; the pool writes their keys
    and makes views of them:

        seq = pool.allocator.create(prompt)
        start = pool.allocator.length(seq)              # found in the prefix cache
        pool.write([seq], k[:, :, start:], v[:, :, start:], prompt[start:])
        other = pool.allocator.fork(seq)                # shares every page, copied on write
        attend(make_call(q, pool.view([seq, other]), mask=Mask()))

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
        self.allocator = PageAllocator(num_pages, page_size)
        self.dtype, self._grows = dtype, grows
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, used or not."""
        return 0 if self._k is None or self._v is None else self._k.nbytes + self._v.nbytes

    @property
    def like(self) -> tuple[Tensor | None, Tensor | None]:
        """The pages `[num_pages, Hkv, page_size, D]`, for their sizes."""
        return self._k, self._v

    def write(
        self, seqs: Sequence[int], k: Tensor, v: Tensor, tokens: Sequence[int] | None = None
    ) -> None:
        """Append keys `[B, Hkv, t, D]` and values `[B, Hkv, t, Dv]` to B sequences of one length.

        Args:
            tokens: their token ids, where B is 1 and the pages shall enter the prefix cache.

        Raises:
            Unsupported: the pool is full and may not grow; nothing has changed then.
        """
        count, size = k.shape[2], self.allocator.page_size
        self._make_room(seqs, k, v)
        start = self.allocator.length(seqs[0])
        assert all(self.allocator.length(seq) == start for seq in seqs), "sequences of one length"
        # Copy after each sequence: a page shared by two sequences of the batch is copied for the
        # first and written in place by the second.
        for seq in seqs:
            self._copy(self.allocator.extend(seq, count, tokens))
        assert self._k is not None and self._v is not None
        at = torch.arange(start, start + count, device=k.device)
        tables = [self.allocator.page_table(seq) for seq in seqs]
        of_token = [[pages[i // size] for i in range(start, start + count)] for pages in tables]
        pages = torch.tensor(of_token, dtype=torch.int64, device=k.device)  # [B, t]
        self._k[pages, :, at % size] = k.transpose(1, 2).to(self._k.dtype)
        self._v[pages, :, at % size] = v.transpose(1, 2).to(self._v.dtype)

    def view(self, seqs: Sequence[int], page_table: Tensor | None = None) -> PagedKV:
        """A view of some sequences, without a copy; they may differ in length.

        Args:
            page_table: their `page_table`, where the caller still has it.
        """
        assert self._k is not None and self._v is not None
        kv_lens = [self.allocator.length(seq) for seq in seqs]
        return PagedKV(
            self._k,
            self._v,
            self.page_table(seqs, self._k.device) if page_table is None else page_table,
            torch.tensor(kv_lens, dtype=torch.int32, device=self._k.device),
            max(kv_lens),
        )

    def page_table(self, seqs: Sequence[int], device: torch.device) -> Tensor:
        """Pages of each sequence, int32 `[B, most pages]`, padded with 0."""
        tables = [self.allocator.page_table(seq) for seq in seqs]
        width = max(map(len, tables))
        padded = [pages + [0] * (width - len(pages)) for pages in tables]
        return torch.tensor(padded, dtype=torch.int32, device=device).view(len(seqs), width)

    def _make_room(self, seqs: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Grow where that is needed and allowed, and allocate the tensors."""
        for name, x, stored in (("k", k, self._k), ("v", v, self._v)):
            if stored is not None and (x.shape[1], x.shape[3]) != (
                stored.shape[1],
                stored.shape[3],
            ):
                raise ValueError(
                    f"{name} must have the {stored.shape[1]} heads and the head_dim "
                    f"{stored.shape[3]} of this pool, got {list(x.shape)}. Make another pool."
                )
        allocator = self.allocator
        missing = allocator.num_needed(seqs, k.shape[2]) - allocator.num_available
        if missing > 0 and self._grows:
            allocator.grow(grown_pages(allocator.num_pages, missing))
        allocator.check_room(seqs, k.shape[2])
        new_k, new_v = self._grown(self._k, k), self._grown(self._v, v)
        self._k, self._v = new_k, new_v

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        heads, dim = like.shape[1], like.shape[3]
        have = 0 if old is None else old.shape[0]
        if old is not None and have == self.allocator.num_pages:
            return old
        shape = (self.allocator.num_pages, heads, self.allocator.page_size, dim)
        new = torch.empty(shape, dtype=self.dtype or like.dtype, device=like.device)
        if old is not None:
            new[:have] = old
        return new

    def _copy(self, copies: list[PageCopy]) -> None:
        assert self._k is not None and self._v is not None
        for source, target in copies:
            self._k[target] = self._k[source]
            self._v[target] = self._v[source]


class PagedCache(SummarizingCache):
    """The rows of a batch as sequences of a pool; see LayerCache.

    `reorder` forks sequences instead of copying keys, so the beams of a search share the pages
    they have in common.

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
        self._sequences: list[int] = []  # one for each row of the batch
        self._seen = 0
        self._prompt: list[int] = []  # announced by `match_prefix`
        self._table_rows: list[list[int]] = []  # the page tables that `_page_table` was made of
        self._page_table: Tensor | None = None

    @property
    def seen(self) -> int:
        """Tokens appended or found in the prefix cache."""
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, of the page table of these rows, and of summaries."""
        table = 0 if self._page_table is None else self._page_table.nbytes
        return self.pool.nbytes + table + (0 if self.summaries is None else self.summaries.nbytes)

    def append(self, k: Tensor, v: Tensor) -> PagedKV:
        """Store a chunk; see LayerCache."""
        check_append(k, v, *self._like())
        if not self._sequences:
            self._sequences = [self.pool.allocator.create() for _ in range(k.shape[0])]
        stop = self._seen + k.shape[2]
        known = len(self._sequences) == 1 and stop <= len(self._prompt)
        tokens = self._prompt[self._seen : stop] if known else None
        try:
            self.pool.write(self._sequences, k, v, tokens)
            self._seen = stop
        except BaseException:  # an interrupt: pages without keys go back
            for seq in self._sequences:
                self.pool.allocator.truncate(seq, self._seen)
            raise
        self.summarize()
        return self.view()

    def lasting(self) -> tuple[int, int]:
        """See SummarizingCache."""
        pages = len(self.pool.allocator.page_table(self._sequences[0])) if self._sequences else 0
        return self._seen, pages * self.pool.allocator.page_size

    def keys(self, start: int, stop: int) -> Tensor:
        """See SummarizingCache."""
        if start == stop:
            like = self._like()[0]
            assert like is not None
            return like
        return joined(list(self.view().tiles((KeyRange(start, stop),), stop - start))).k

    def match_prefix(self, tokens: Sequence[int]) -> int:
        """Begin an empty cache of one row with the cached prefix of a prompt.

        Pages that `append` fills with the rest of the prompt enter the prefix cache of the pool.

        Args:
            tokens: of the prompt, without the last one where its logits are wanted.

        Returns:
            Tokens found in the prefix cache; append the keys of those after.

        Raises:
            Unsupported: the cache is not empty.
        """
        if self._sequences:
            raise Unsupported(f"this cache holds {self._seen} tokens already: reset it first.")
        self._prompt = list(tokens)
        self._sequences = [self.pool.allocator.create(self._prompt)]
        self._seen = self.pool.allocator.length(self._sequences[0])
        return self._seen

    def fork(self) -> PagedCache:
        """A cache that shares all pages with this one; a shared page is copied on write."""
        other = PagedCache(self.pool)
        other._sequences = [self.pool.allocator.fork(seq) for seq in self._sequences]
        other._seen, other._prompt = self._seen, list(self._prompt)
        other.summaries = None if self.summaries is None else self.summaries.empty()
        return other

    def view(self) -> PagedKV:
        """Everything stored, without a copy."""
        tables = [self.pool.allocator.page_table(seq) for seq in self._sequences]
        # Most steps stay in their last page: then the tensor of the step before is still right.
        if self._page_table is None or tables != self._table_rows:
            self._table_rows = [list(pages) for pages in tables]
            self._page_table = None
        view = self.pool.view(self._sequences, self._page_table)
        self._page_table = view.page_table
        return view

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i], without copying a page."""
        if self._sequences:
            check_rows(rows, len(self._sequences))
        old, fork = self._sequences, self.pool.allocator.fork
        self._sequences = [fork(old[i]) for i in rows.tolist()] if old else []
        self._release(old)
        if self.summaries is not None:
            self.summaries.reorder(rows)

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on and release their pages."""
        check_length(length)
        for seq in self._sequences:
            self.pool.allocator.truncate(seq, length)
        self._seen = min(self._seen, length)
        self.cut_summaries(length)
        del self._prompt[length:]

    def max_rollback(self, length: int) -> int:
        """Any position."""
        return min(length, self._seen)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1; later keys are written again, re-rotated."""
        check_shift(start, stop, self._seen)
        stored = dense(self.view())
        k, v = shift(stored.k[:, :, stop:], start - stop), stored.v[:, :, stop:].clone()
        self.truncate(start)
        self.append(k, v)

    def reset(self) -> None:
        """Remove everything; the pool stays allocated."""
        self._release(self._sequences)
        self._sequences, self._seen, self._prompt = [], 0, []
        self._page_table = None
        self.cut_summaries(0)

    def state(self) -> CacheState:
        """See LayerCache; the tensors are gathered from the pages."""
        tensors: dict[str, Tensor] = {}
        if self._seen:
            stored = dense(self.view())
            tensors = {"k": stored.k, "v": stored.v}
        page_size = self.pool.allocator.page_size
        settings = {"page_size": page_size, "dtype": dtype_name(self.pool.dtype)}
        return CacheState(settings, {"seen": self._seen}, tensors)

    def restore(self, state: CacheState, device: torch.device) -> None:
        """See LayerCache."""
        seen = state.progress["seen"]
        expect_tensors(state, {"k": seen, "v": seen})
        self.reset()
        if state.tensors:
            self.append(state.tensors["k"].to(device), state.tensors["v"].to(device))

    def _like(self) -> tuple[Tensor | None, Tensor | None]:
        """Empty tensors with the sizes of what is stored; None where nothing was."""
        k, v = self.pool.like
        if k is None or v is None or not self._sequences:
            return None, None
        rows = len(self._sequences), k.shape[1], 0
        return k.new_empty(*rows, k.shape[3]), v.new_empty(*rows, v.shape[3])

    def _release(self, seqs: list[int]) -> None:
        for seq in seqs:
            self.pool.allocator.release(seq)
