"""Keys in pages as flash-attn stores them, `[pages, page_size, kv_heads, head_dim]`, as a view."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import PagedKV
from saccade.core.check import check_exactly, describe, extremes, is_plain_tensor, readable

PAGES = "pages, page_size, kv_heads, head_dim"


def check_table(table: object, rows: int, q: Tensor) -> Tensor:
    """A block_table, int32 `[rows, pages of a row]` on the device of the queries.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not is_plain_tensor(table) or table.ndim != 2:  # type: ignore[attr-defined]
        raise TypeError(
            f"block_table must be an int32 tensor [rows, pages], got {describe(table)}."
        )
    assert isinstance(table, Tensor)
    check_exactly("block_table", table, (torch.int32,), (rows, table.shape[1]), q.device)
    return table


def paged_view(
    k: Tensor, v: Tensor, table: Tensor, kv_lens: Tensor, longest: int | None = None
) -> PagedKV:
    """The pages as a view; nothing is copied.

    Args:
        k, v: `[pages, page_size, kv_heads, ..]`.
        table: int32 `[batch, pages of a row]`.
        kv_lens: int32 `[batch]`, keys of each row.
        longest: at least the largest of kv_lens, used where they are on a GPU; default: what the
            pages of a row hold.

    Raises:
        ValueError: a row that its pages do not hold, or a page that does not exist (on a CPU).
    """
    held = table.shape[1] * k.shape[1]
    end = held if longest is None else min(longest, held)
    if readable(kv_lens) and kv_lens.numel():
        end = extremes(kv_lens)[1]
    if end > held:
        raise ValueError(
            f"block_table has {table.shape[1]} pages of {k.shape[1]} keys a row, which do not "
            f"hold {end} keys. Give every row as many pages as its keys need."
        )
    return PagedKV(k.transpose(1, 2), v.transpose(1, 2), table, kv_lens, end)
