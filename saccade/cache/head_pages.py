"""Pages that belong to one KV head of one row each, so that every head may keep another number.

The bookkeeping is that of `pages.Pages`, with one sequence for every (row, head).  A slot knows
the position of its key, because what a head keeps has gaps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache.pages import Copy, Pages
from saccade.core import RaggedKV

GROWTH_SHARE = 16


class Held(NamedTuple):
    """What all heads hold, side by side.

    Attributes:
        k: `[B, Hkv, n, D]`; v: `[B, Hkv, n, Dv]`; n is the largest number of keys of a head.
        positions: int64 `[B, Hkv, n]`, ascending; heads with fewer keys begin with -1s, so that
            the newest keys of all heads stand in the same columns.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


class HeadPages:
    """Keys and values of B rows and Hkv heads, each with a number of keys of its own.

    Args:
        like_k, like_v: `[B, Hkv, ., D]` and `[.., Dv]`, whose dtype and device the storage takes.
        page_size: tokens of a page.
    """

    def __init__(self, like_k: Tensor, like_v: Tensor, page_size: int) -> None:
        batch, self._heads = like_k.shape[:2]
        self._pages = Pages(0, page_size)
        self._rows = [self._pages.create() for _ in range(batch * self._heads)]
        self._k = like_k.new_empty(0, page_size, like_k.shape[3])
        self._v = like_v.new_empty(0, page_size, like_v.shape[3])
        self._positions = torch.empty(0, page_size, dtype=torch.int32, device=like_k.device)
        self._describe()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, of the positions in them, and of the tables."""
        parts = (self._k, self._v, self._positions, self._table, self._kv_lens)
        return sum(part.nbytes for part in parts)

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def kv_lens(self) -> Tensor:
        """Keys of each row and head, int32 `[B, Hkv]`."""
        return self._kv_lens

    @property
    def num_keys(self) -> int:
        """Keys of all rows and heads together."""
        return sum(map(self._pages.length, self._rows))

    def write(self, k: Tensor, v: Tensor, positions: Tensor, kept: Tensor | None = None) -> None:
        """Add keys `[B, Hkv, t, D]` and values behind those of each head.

        Args:
            k, v: the new keys and values.
            positions: of the keys, `[B | 1, Hkv | 1, t]`.
            kept: bool `[B, Hkv, t]`, which of them to add; None for all.
        """
        before = [self._pages.length(row) for row in self._rows]
        counts = [k.shape[2]] * len(before)
        if kept is not None:
            counts = kept.sum(-1).flatten().tolist()
        self._extend(counts)
        slots = torch.tensor(self._slots(before), dtype=torch.int64, device=k.device)
        at = positions.to(torch.int32).expand(k.shape[:3])
        chosen = slice(None) if kept is None else kept
        self._k.flatten(0, 1)[slots] = k[chosen].reshape(-1, k.shape[3]).to(self._k.dtype)
        self._v.flatten(0, 1)[slots] = v[chosen].reshape(-1, v.shape[3]).to(self._v.dtype)
        self._positions.flatten()[slots] = at[chosen].flatten()

    def view(self, end: int) -> RaggedKV:
        """Everything held, without a copy; `end` is one past the last position seen."""
        longest = max(map(self._pages.length, self._rows))
        storage = (self._k, self._v, self._positions, self._table, self._kv_lens)
        return RaggedKV(*storage, end, longest)

    def held(self) -> Held:
        """A copy of everything held, heads side by side."""
        size = self._pages.page_size
        longest = max(map(self._pages.length, self._rows))
        rank = torch.arange(longest, device=self._k.device) - longest + self._kv_lens[..., None]
        real = rank >= 0  # [B, Hkv, n]
        rank = rank.clamp_min(0).long()
        slots = self._table.gather(2, rank // size).long() * size + rank % size
        positions = self._positions.flatten()[slots].long().masked_fill(~real, -1)
        return Held(self._k.flatten(0, 1)[slots], self._v.flatten(0, 1)[slots], positions)

    def forget_newest(self, count: int) -> None:
        """Forget the last `count` keys of every head; their pages are free for others."""
        for row in self._rows:
            self._pages.truncate(row, self._pages.length(row) - count)
        self._describe()

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]; pages are shared until they differ."""
        old, heads = self._rows, self._heads
        wanted = [old[i * heads + head] for i in rows.tolist() for head in range(heads)]
        self._rows = [self._pages.fork(row) for row in wanted]
        for row in old:
            self._pages.release(row)
        self._describe()

    def grow(self, num_pages: int) -> None:
        """Allocate pages until there are `num_pages`."""
        if num_pages <= self._pages.num_pages:
            return
        self._pages.grow(num_pages)
        self._k, self._v, self._positions = (
            _grown(x, num_pages) for x in (self._k, self._v, self._positions)
        )

    def _slots(self, before: list[int]) -> list[int]:
        """Where the keys behind the first `before` of each row and head lie, in order."""
        size, slots = self._pages.page_size, list[int]()
        for row, first in zip(self._rows, before, strict=True):
            pages = self._pages.table(row)
            slots += [
                pages[i // size] * size + i % size for i in range(first, self._pages.length(row))
            ]
        return slots

    def _extend(self, counts: list[int]) -> None:
        """Room for so many more keys of each row and head."""
        needed = sum(self._pages.needed([r], n) for r, n in zip(self._rows, counts, strict=True))
        missing = needed - self._pages.num_available
        if missing > 0:
            have = self._pages.num_pages
            self.grow(have + max(missing, have // GROWTH_SHARE))
        before = self._pages.num_available
        # One after the other, copies at once, as in PagePool.write.
        for row, count in zip(self._rows, counts, strict=True):
            self._copy(self._pages.extend(row, count))
        if self._pages.num_available != before:
            self._describe()
        else:  # most steps: the last pages had room
            self._describe_kv_lens()

    def _copy(self, copies: list[Copy]) -> None:
        for source, target in copies:
            for x in (self._k, self._v, self._positions):
                x[target] = x[source]

    def _describe(self) -> None:
        """The tables as kernels read them."""
        lists = [self._pages.table(row) for row in self._rows]
        most = max(map(len, lists))
        padded = [pages + [0] * (most - len(pages)) for pages in lists]
        table = torch.tensor(padded, dtype=torch.int32, device=self._k.device)
        self._table = table.view(len(lists) // self._heads, self._heads, most)
        self._describe_kv_lens()

    def _describe_kv_lens(self) -> None:
        kv_lens = [self._pages.length(row) for row in self._rows]
        flat = torch.tensor(kv_lens, dtype=torch.int32, device=self._k.device)
        self._kv_lens = flat.view(-1, self._heads)


def _grown(x: Tensor, num_pages: int) -> Tensor:
    new = x.new_empty(num_pages, *x.shape[1:])
    new[: x.shape[0]] = x
    return new
