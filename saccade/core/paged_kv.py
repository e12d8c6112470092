"""Views of storage in pages: whole sequences, or a different number of keys for every head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.kv import KVTile, TensorView, split_ranges
from saccade.core.mask import KeyRange


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
    """

    k: Tensor
    v: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    hadamard: bool = False

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
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    page_table: Tensor
    kv_lens: Tensor
    end: int
    max_length: int
    hadamard: bool = False

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
