"""Views of storage in pages: whole sequences, or a different number of keys for every head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.check import (
    LARGEST_POSITION,
    check_bounds,
    check_device,
    check_exactly,
    check_tensor,
    extremes,
    integer,
    readable,
)
from saccade.core.kv import KVTile, TensorView, check_storage, split_ranges
from saccade.core.mask import KeyRange


def _check_table(table: Tensor, kv_lens: Tensor, longest: int, pages: int, size: int) -> None:
    """Raise ValueError unless each row's pages hold its keys and are pages of the pool.

    Page numbers and lengths on a GPU are not read.
    """
    check_device("page_table", table, kv_lens.device)
    if size == 0 or longest > table.shape[-1] * size:
        raise ValueError(
            f"{table.shape[-1]} pages of {size} keys a row do not hold {longest} keys: "
            "the page table is too narrow."
        )
    check_bounds("kv_lens of the view", kv_lens, 0, longest)
    if not readable(table) or table.numel() == 0:
        return
    low, high = extremes(table)
    if low >= 0 and high < pages:
        return
    starts = torch.arange(0, table.shape[-1] * size, size, device=table.device)
    used = starts < kv_lens[..., None]
    wrong = table[used & ((table < 0) | (table >= pages))]
    if wrong.numel():
        raise ValueError(f"page_table names page {int(wrong[0])}, but the pool has {pages} pages.")


def _lay_out(view: TensorView, *names: str) -> None:
    """Make index tensors contiguous, as kernels read them; they are small."""
    for name in names:
        if not (index := getattr(view, name)).is_contiguous():
            object.__setattr__(view, name, index.contiguous())


@dataclass(frozen=True, slots=True)
class PagedKV(TensorView):
    """Pages of a shared pool (PagedAttention, arXiv 2309.06180).

    Position p of row b lies in page `page_table[b, p // page_size]`, slot `p % page_size`.

    Args:
        k: `[num_pages, Hkv, page_size, D]`; v: `[num_pages, Hkv, page_size, Dv]`.
        page_table: int32 `[B, max_pages]`; entries past a row's length are ignored.
        kv_lens: int32 `[B]`, keys of each row.
        end: the largest of kv_lens, on the host, so that reading it needs no synchronization.
        hadamard: see KVView.

    Raises:
        TypeError, ValueError: tensors that do not fit together; on a CPU also a page that the
            pool does not have, or a row longer than its pages.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_storage(
            self.k, self.v, "pages, heads, page_size, head_dim", 3, "pages, heads and page_size"
        )
        table = check_tensor("page_table", self.page_table, (torch.int32,), "batch, max_pages")
        lens = (torch.int32,)
        check_exactly("kv_lens of the view", self.kv_lens, lens, (table.shape[0],), self.device)
        object.__setattr__(self, "end", integer("end", self.end, 0, LARGEST_POSITION))
        _check_table(table, self.kv_lens, self.end, self.k.shape[0], self.page_size)
        _lay_out(self, "page_table", "kv_lens")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        _, heads, _, dim = self.k.shape
        return self.page_table.shape[0], heads, self.end, dim, self.v.shape[3]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k.shape[2]

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        for keys in split_ranges(ranges, size):
            at = torch.arange(keys.start, keys.stop, device=self.device)
            stored = at[None] < self.kv_lens[:, None]  # [B, t]
            pages = self.page_table[:, at // self.page_size].masked_fill(~stored, 0).long()
            k = self.k[pages, :, at % self.page_size]  # [B, t, Hkv, D]
            v = self.v[pages, :, at % self.page_size]
            positions = at[None].masked_fill(~stored, -1)[:, None]  # [B, 1, t]
            yield KVTile(k.transpose(1, 2), v.transpose(1, 2), positions)


@dataclass(frozen=True, slots=True)
class RaggedKV(TensorView):
    """A different number of keys for every row and KV head, in pages that belong to one head.

    Args:
        k: `[num_pages, page_size, D]`; v: `[num_pages, page_size, Dv]`.
        positions: int32 `[num_pages, page_size]`, the absolute position each slot holds.
        page_table: int32 `[B, Hkv, max_pages]`; kv_lens: int32 `[B, Hkv]`, keys of each head.
        end: one past the last position seen; max_length: the largest of kv_lens; both on the host.
        hadamard: see KVView.

    Raises:
        TypeError, ValueError: as PagedKV.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    max_length: int
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_storage(self.k, self.v, "pages, page_size, head_dim", 2, "pages and page_size")
        table = check_tensor("page_table", self.page_table, (torch.int32,), "batch, heads, pages")
        ints, slots = (torch.int32,), tuple(self.k.shape[:2])
        check_exactly("positions", self.positions, ints, slots, self.device)
        check_exactly("kv_lens of the view", self.kv_lens, ints, (*table.shape[:2],), self.device)
        for name in ("end", "max_length"):
            number = integer(name, getattr(self, name), 0, LARGEST_POSITION)
            object.__setattr__(self, name, number)
        _check_table(table, self.kv_lens, self.max_length, self.k.shape[0], self.page_size)
        _lay_out(self, "page_table", "kv_lens", "positions")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See KVView."""
        batch, heads, _ = self.page_table.shape
        return batch, heads, self.end, self.k.shape[2], self.v.shape[2]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k.shape[1]

    def tiles(self, ranges: Sequence[KeyRange], size: int) -> Iterator[KVTile]:
        """See KVView."""
        # Slots of a head hold arbitrary positions, so every slot is read and the mask decides.
        for keys in split_ranges((KeyRange(0, self.max_length),) if ranges else (), size):
            at = torch.arange(keys.start, keys.stop, device=self.device)
            stored = at < self.kv_lens[..., None]  # [B, Hkv, t]
            pages = self.page_table[..., at // self.page_size].masked_fill(~stored, 0).long()
            slot = at % self.page_size
            positions = self.positions[pages, slot].long().masked_fill(~stored, -1)
            yield KVTile(self.k[pages, slot], self.v[pages, slot], positions)
