"""Named tuples of pointers, strides and numbers, passed to Triton and Gluon kernels as arguments.

A field that is None is a compile-time constant, so a kernel compiled without a window, bias or
padding contains no code for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_SPANS = 4  # contiguous runs of positions of a ring that a decoding kernel takes


class StridedTensor(NamedTuple):
    """A tensor `[batch, heads, rows, dim]` with unit last stride: pointer and strides."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class QuantizedStrided(NamedTuple):
    """A QuantizedTensor `[B, Hkv, N, D]`: a StridedTensor of each of its tensors."""

    qdata: Any
    scale: Any
    offset: Any


class PageTable(NamedTuple):
    """How slots of a row are found: `table` is None where they are contiguous.

    Attributes:
        table: int32 `[B, Hkv]` rows of page numbers, with strides batch and head.
        k_page, v_page: strides from page to page.
        positions: int32 `[pages, page size]`, the position of the key in each slot, or None.
    """

    table: Any = None
    batch: Any = None
    head: Any = None
    k_page: Any = None
    v_page: Any = None
    positions: Any = None


class MaskArgs(NamedTuple):
    """The attention mask beyond causality; every field may be None.

    Attributes:
        window, sinks: as in Mask.
        key_padding: bool `[B, Lk]`, True for real keys; key_padding_row: its row stride.
        attn_mask: bool `[B, H, Lq, Lk]`; block_mask: the blocks of a BlockSelection, bool
            `[B, Hkv, q blocks, k blocks]`, each q_block x k_block; both with their strides.
    """

    window: Any = None
    sinks: Any = None
    key_padding: Any = None
    key_padding_row: Any = None
    attn_mask: Any = None
    attn_mask_batch: Any = None
    attn_mask_head: Any = None
    attn_mask_row: Any = None
    block_mask: Any = None
    block_mask_batch: Any = None
    block_mask_head: Any = None
    block_mask_row: Any = None
    q_block: Any = None
    k_block: Any = None


class ScoreArgs(NamedTuple):
    """How a score is made from q.k: `scale`, softcap, ALiBi slopes, learned sinks.

    Attributes:
        alibi_slopes: float32 `[B, H]` or None; alibi_slopes_batch: its batch stride.
        sink_logits: float32 `[H]` or None.
    """

    scale: Any
    softcap: Any = None
    alibi_slopes: Any = None
    alibi_slopes_batch: Any = None
    sink_logits: Any = None


class SeqlenInfo(NamedTuple):
    """Sequence lengths and offsets that differ over the batch; every field may be None.

    Attributes:
        q_offsets: int64 `[B]`, position of each row's first query.
        kv_lens: int32 or int64 `[B, Hkv]` (strides kv_lens_batch, kv_lens_head), keys of each row.
        cu_q, cu_k: cumulative lengths of packed sequences (varlen).
        sequence: int32 `[tiles]`, the packed sequence of each tile, -1 for none; first_tile: int32
            `[sequences]`, the first tile of each.
        origin: int64 `[1]`, the position of key 0; q_offsets and kv_lens are then made relative
            to it.
    """

    q_offsets: Any = None
    kv_lens: Any = None
    kv_lens_batch: Any = None
    kv_lens_head: Any = None
    cu_q: Any = None
    cu_k: Any = None
    sequence: Any = None
    first_tile: Any = None
    origin: Any = None


class BlockLists(NamedTuple):
    """Block-sparse index lists: which tiles to compute, full ones first, then partial ones.

    Attributes:
        tiles: int32 `[B | 1, Hkv | 1, rows, columns]`; counts: int32 `[B | 1, Hkv | 1, rows, 2]`,
            how many are full and how many are listed at all.
    """

    tiles: Any = None
    counts: Any = None
    batch: Any = None
    head: Any = None
    row: Any = None
