"""The tile scheduler of the gradients: keys of a CTA, tiles of queries, buffers of dS."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.gpu.triton_lang import query_tiles

BLOCK_M = gl.constexpr(64)  # queries of a tile
CONSUMERS, KEYS = gl.constexpr(2), gl.constexpr(64)  # consumer warpgroups, keys of each


@gluon.jit
def kv_work_tile(sizes, mask_args, CAUSAL: gl.constexpr):
    """Work of a CTA: (batch, split, first key, first tile of queries, count, full_from, full_to).

    Tiles of queries [full_from, full_to) need no mask.  Keys with most queries come first, within
    sections of splits whose Q, dO and dQ fit the L2 cache together.
    """
    q_len, k_len, q_offset, num_splits, _groups, _gqa_splits, splits_per_section = sizes
    per_section = gl.cdiv(k_len, CONSUMERS * KEYS) * splits_per_section
    inside = gl.program_id(0) % per_section
    split = (gl.program_id(0) // per_section) * splits_per_section + inside % splits_per_section
    start = (inside // splits_per_section) * (CONSUMERS * KEYS)
    stop = start + CONSUMERS * KEYS
    first, full_from, full_to, last = query_tiles(
        start, gl.minimum(stop, k_len) - 1, q_len, q_offset, mask_args, CAUSAL, BLOCK_M
    )
    full_from = gl.where(stop > k_len, last, full_from)
    return split // num_splits, split % num_splits, start, first, last - first, full_from, full_to


@gluon.jit
def next_q_tile(h, tile, row, first, count, skipped, STEP: gl.constexpr):
    """The next tile of queries: (head, tile within it, row of a tensor of STEP rows a tile).

    A head has `count` visible tiles, beginning with `first`, and `skipped` others.
    """
    tile += 1
    wrapped = tile == first + count
    row += gl.where(wrapped, 1 + skipped, 1) * STEP
    return gl.where(wrapped, h + 1, h), gl.where(wrapped, first, tile), row


@gluon.jit
def ds_buffer(i):
    """The buffer of dS of the i-th tile, and the phase of its mbarrier.

    Four buffers need no `empty` barrier: a consumer stores tile i after it has waited for tile
    i - 1 of the other, which by then has computed dQ of tile i - 3.
    """
    return i & 3, (i >> 2) & 1
