"""Records of pointers and numbers that travel into Triton and Gluon kernels as named tuples.

A field that is None is known at compile time, so a kernel without a window, bias or padding holds
no trace of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class StridedTensor(NamedTuple):
    """A tensor `[batch, heads, rows, dim]` with unit last stride: pointer and strides."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class MaskArgs(NamedTuple):
    """Who sees whom, beyond causality; every field may be None.

    Attributes:
        window, sinks: as in Mask.
        padding: bool `[B, Lk]`, True for real keys; padding_row: its row stride.
        foreign: bool mask `[B, H, Lq, Lk]`; allowed: selection `[B, Hkv, q blocks, k blocks]` of
            q_block x k_block; each with its strides.
    """

    window: Any = None
    sinks: Any = None
    padding: Any = None
    padding_row: Any = None
    foreign: Any = None
    foreign_batch: Any = None
    foreign_head: Any = None
    foreign_row: Any = None
    allowed: Any = None
    allowed_batch: Any = None
    allowed_head: Any = None
    allowed_row: Any = None
    q_block: Any = None
    k_block: Any = None


class ScoreArgs(NamedTuple):
    """What turns q.k into a score: `scale` (times log2(e) if raw), softcap, ALiBi slopes, sinks.

    Attributes:
        slopes: float32 `[B, H]` or None; slopes_batch: its batch stride.
        sinks: float32 `[H]` learned logits or None.
    """

    scale: Any
    softcap: Any = None
    slopes: Any = None
    slopes_batch: Any = None
    sinks: Any = None


class SeqlenInfo(NamedTuple):
    """Where rows begin and end, for what differs over the batch; every field may be None.

    Attributes:
        offsets: int64 `[B]`, position of each row's first query.
        kv_lens: int32 or int64 `[B, Hkv]` (strides kv_lens_batch, kv_lens_head), keys of each row.
        cu_q, cu_k: cumulative lengths of packed documents.
        document: int32 `[tiles]`, the document a tile lies in, -1 for none; first_tile: int32
            `[documents]`, the first tile of each.
        origin: int64 `[1]`, the position of key 0; offsets and kv_lens count from it afterwards.
    """

    offsets: Any = None
    kv_lens: Any = None
    kv_lens_batch: Any = None
    kv_lens_head: Any = None
    cu_q: Any = None
    cu_k: Any = None
    document: Any = None
    first_tile: Any = None
    origin: Any = None


class BlockLists(NamedTuple):
    """Tiles to visit where a BlockSelection decides: the full ones first, then those with holes.

    Attributes:
        tiles: int32 `[B | 1, Hkv | 1, rows, columns]`; counts: int32 `[B | 1, Hkv | 1, rows, 2]`,
            how many are full and how many are to be visited at all.
    """

    tiles: Any = None
    counts: Any = None
    batch: Any = None
    head: Any = None
    row: Any = None
