"""Pages that belong to one KV head of one row each, so that every head can keep its own number.

Page tables come from `page_allocator.PageAllocator`, one sequence for every (row, head).  Each slot
stores the position of its key, because the keys that a head keeps have gaps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache.page_allocator import PageAllocator, PageCopy, grown_pages
from saccade.core import RaggedKV


class GatheredKV(NamedTuple):
    """The keys and values of all heads, gathered from their pages and right-aligned.

    Attributes:
        k: `[B, Hkv, n, D]`; v: `[B, Hkv, n, Dv]`; n is the largest number of keys of a head.
        positions: int64 `[B, Hkv, n]`, ascending; heads with fewer keys are padded with -1 on the
            left, so that the newest keys of all heads are in the same columns.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


class PerHeadPages:
    """Keys and values of B rows and Hkv heads, each with a number of keys of its own.

    Args:
        like_k, like_v: `[B, Hkv, ., D]` and `[.., Dv]`, whose dtype and device the storage takes.
        page_size: keys of a page.
    """

    def __init__(self, like_k: Tensor, like_v: Tensor, page_size: int) -> None:
        batch, self._heads = like_k.shape[:2]
        self._allocator = PageAllocator(0, page_size)
        self._sequences = [self._allocator.create() for _ in range(batch * self._heads)]
        self._k = like_k.new_empty(0, page_size, like_k.shape[3])
        self._v = like_v.new_empty(0, page_size, like_v.shape[3])
        self._positions = torch.empty(0, page_size, dtype=torch.int32, device=like_k.device)
        self._placing = False  # whether sequences are longer than kv_lens says
        self._update_page_table()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, of the positions in them, and of the page tables."""
        parts = (self._k, self._v, self._positions, self._page_table, self._kv_lens)
        return sum(part.nbytes for part in parts)

    @property
    def like(self) -> tuple[Tensor, Tensor]:
        """Empty tensors `[B, Hkv, 0, D]` with the sizes of what is stored."""
        rows, k, v = self._kv_lens.shape, self._k, self._v
        return k.new_empty(*rows, 0, k.shape[2]), v.new_empty(*rows, 0, v.shape[2])

    @property
    def num_pages(self) -> int:
        """Pages allocated, used or not."""
        return self._allocator.num_pages

    @property
    def kv_lens(self) -> Tensor:
        """Keys of each row and head, int32 `[B, Hkv]`."""
        return self._kv_lens

    def write(self, k: Tensor, v: Tensor, positions: Tensor, kept: Tensor | None = None) -> None:
        """Append keys `[B, Hkv, t, D]` and values to each head.

        Args:
            positions: of the keys, `[B | 1, Hkv | 1, t]`.
            kept: bool `[B, Hkv, t]`, which of them to append; None for all.
        """
        self._forget_places()
        before = [self._allocator.length(seq) for seq in self._sequences]
        counts = [k.shape[2]] * len(before)
        if kept is not None:
            counts = kept.sum(-1).flatten().tolist()
        try:
            self._extend(counts)
            self._store(k, v, positions, kept, before)
        except BaseException:  # an interrupt: pages without keys go back
            for seq, length in zip(self._sequences, before, strict=True):
                self._allocator.truncate(seq, length)
            self._update_page_table()
            raise

    def place(self, count: int) -> None:
        """Make room for `count` more keys of each head, which are written to `storage`."""
        self._forget_places()
        kv_lens = self._kv_lens
        self._placing = True
        self._extend([count] * len(self._sequences))
        self._kv_lens = kv_lens  # they count when they are there

    def commit(self, count: int) -> None:
        """Count keys that were written to their places."""
        self._kv_lens.add_(count)
        self._placing = False

    def _forget_places(self) -> None:
        """Take back the room of places that were not committed."""
        if not self._placing:
            return
        lengths = self._kv_lens.flatten().tolist()
        for seq, length in zip(self._sequences, lengths, strict=True):
            self._allocator.truncate(seq, length)
        self._placing = False
        self._update_page_table()

    def storage(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, positions, page tables and lengths, as a RaggedKV takes them."""
        return self._k, self._v, self._positions, self._page_table, self._kv_lens

    def _store(
        self, k: Tensor, v: Tensor, positions: Tensor, kept: Tensor | None, before: list[int]
    ) -> None:
        """Write the chosen keys behind the first `before` of each row and head."""
        slots = self._slots_from(before).to(k.device)
        at = positions.to(torch.int32).expand(k.shape[:3])
        chosen = slice(None) if kept is None else kept
        self._k.flatten(0, 1)[slots] = k[chosen].reshape(-1, k.shape[3]).to(self._k.dtype)
        self._v.flatten(0, 1)[slots] = v[chosen].reshape(-1, v.shape[3]).to(self._v.dtype)
        self._positions.flatten()[slots] = at[chosen].flatten()

    def view(self, end: int) -> RaggedKV:
        """Everything stored, without a copy; `end` is one past the last position seen."""
        self._forget_places()
        longest = max(map(self._allocator.length, self._sequences))
        return RaggedKV(*self.storage(), end, longest)

    def gather(self) -> GatheredKV:
        """A copy of everything stored, one column for each key; see GatheredKV."""
        self._forget_places()
        size = self._allocator.page_size
        longest = max(map(self._allocator.length, self._sequences))
        index = torch.arange(longest, device=self._k.device) - longest + self._kv_lens[..., None]
        stored = index >= 0  # [B, Hkv, n]
        index = index.clamp_min(0).long()
        slots = self._page_table.gather(2, index // size).long() * size + index % size
        positions = self._positions.flatten()[slots].long().masked_fill(~stored, -1)
        return GatheredKV(self._k.flatten(0, 1)[slots], self._v.flatten(0, 1)[slots], positions)

    def remove_newest(self, count: int) -> None:
        """Remove the last `count` keys of every head and release their pages."""
        self._forget_places()
        for seq in self._sequences:
            self._allocator.truncate(seq, self._allocator.length(seq) - count)
        self._update_page_table()

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]; pages are shared, copied on write."""
        self._forget_places()
        old, heads = self._sequences, self._heads
        wanted = [old[i * heads + head] for i in rows.tolist() for head in range(heads)]
        self._sequences = [self._allocator.fork(seq) for seq in wanted]
        for seq in old:
            self._allocator.release(seq)
        self._update_page_table()

    def grow(self, num_pages: int) -> None:
        """Allocate pages until there are `num_pages`."""
        if num_pages <= self._allocator.num_pages:
            return
        self._allocator.grow(num_pages)
        self._k, self._v, self._positions = (
            _grown(x, num_pages) for x in (self._k, self._v, self._positions)
        )

    def _slots_from(self, before: list[int]) -> Tensor:
        """Slots of the keys after the first `before` of each row and head, in order, int64."""
        size, parts = self._allocator.page_size, list[Tensor]()
        for seq, first in zip(self._sequences, before, strict=True):
            at = torch.arange(first, self._allocator.length(seq))
            pages = torch.tensor(self._allocator.page_table(seq), dtype=torch.int64)
            parts.append(pages[at // size] * size + at % size)
        return torch.cat(parts)

    def _extend(self, counts: list[int]) -> None:
        """Allocate pages for `counts` more keys, one number for each row and head."""
        pairs = list(zip(self._sequences, counts, strict=True))
        needed = sum(self._allocator.num_needed([seq], count) for seq, count in pairs)
        missing = needed - self._allocator.num_available
        if missing > 0:
            self.grow(grown_pages(self._allocator.num_pages, missing))
        before = self._allocator.num_available
        # Copy after each sequence, as in PagePool.write.
        for seq, count in pairs:
            self._copy(self._allocator.extend(seq, count))
        if self._allocator.num_available != before:
            self._update_page_table()
        else:  # most steps: the last pages had room
            self._update_kv_lens()

    def _copy(self, copies: list[PageCopy]) -> None:
        for source, target in copies:
            for x in (self._k, self._v, self._positions):
                x[target] = x[source]

    def _update_page_table(self) -> None:
        """The page tables and lengths as kernels read them: int32 tensors, padded with 0."""
        tables = [self._allocator.page_table(seq) for seq in self._sequences]
        width = max(map(len, tables))
        padded = [pages + [0] * (width - len(pages)) for pages in tables]
        table = torch.tensor(padded, dtype=torch.int32, device=self._k.device)
        self._page_table = table.view(len(tables) // self._heads, self._heads, width)
        self._update_kv_lens()

    def _update_kv_lens(self) -> None:
        kv_lens = [self._allocator.length(seq) for seq in self._sequences]
        flat = torch.tensor(kv_lens, dtype=torch.int32, device=self._k.device)
        self._kv_lens = flat.view(-1, self._heads)


def _grown(x: Tensor, num_pages: int) -> Tensor:
    new = x.new_empty(num_pages, *x.shape[1:])
    new[: x.shape[0]] = x
    return new
