"""Few queries against a long cache, on GPUs: the time goes into reading the cache once.

The queries of a group's heads are the rows of one matrix: row r is query r // groups of head
r % groups, so keys are read once for all of them, and rows of a tile are close in position.  The
keys are divided into splits, one program each (split-KV, Flash-Decoding); `split_kv.py` combines
their results.  With more tiles of rows the same kernel computes prefill over storage that is not
dense.

Where values are the first channels of keys (multi-head latent attention in the space of its
latents, arXiv 2405.04434), both products read the tile that was loaded for the first one.
"""

# Triton's language has no types.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu.triton_lang import (
    LOWEST,
    block_list_at,
    key_tiles,
    load_tile,
    online_softmax,
    pdl_begin,
    real_keys,
    scores_of,
    seqlen_of,
    split_range,
    store_split,
    tile_mask,
    unit_of,
)

NO_LIMIT = tl.constexpr(2**30)  # a number of keys above every position


@triton.jit
def slot_positions(slots, spans):
    """Position of each slot of a ring, -1 where empty; `spans`: flat (slot, position, length)."""
    k_pos = tl.full(slots.shape, -1, tl.int32)
    for i in tl.static_range(len(spans) // 3):
        at = slots - spans[3 * i]
        k_pos = tl.where((at >= 0) & (at < spans[3 * i + 2]), at + spans[3 * i + 1], k_pos)
    return k_pos


@triton.jit(do_not_specialize=["spans", "q_len", "k_len", "num_slots", "q_offset"])
def decode_kernel(
    q, k, v, out, lse, pages, spans, seqlen_info, mask_args, score_args, block_lists, q_len,
    k_len, num_slots, q_offset, splits, out_split, lse_split, kv_heads, groups,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr, CAUSAL: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, REST: tl.constexpr, V_IN_K: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one split; out_split and lse_split are the strides between splits.

    Args:
        REST: channels of keys and queries behind the first HEAD_DIM, which have a tile of their
            own, so that 576 channels are not padded to 1024.
        V_IN_K: values are the first HEAD_DIM channels of keys.
    """
    LATENT: tl.constexpr = V_IN_K or REST > 0
    BLOCK_REST: tl.constexpr = 16 if REST <= 16 else 32 if REST <= 32 else 64
    pdl_begin(PDL)
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    _, _, _, k_len, q_offset, _ = seqlen_of(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = rows // groups
    h = kv_head * groups + rows % groups
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    q_real = index < q_len
    q_pos = index + q_offset
    q_at = q.ptr + b * q.batch + h.to(tl.int64) * q.head + index.to(tl.int64) * q.row
    q_tile = load_tile(q_at[:, None] + dims[None, :], q_real, dims, HEAD_DIM, True)
    if REST > 0:
        rest = HEAD_DIM + tl.arange(0, BLOCK_REST)
        q_rest = load_tile(q_at[:, None] + rest[None, :], q_real, rest, HEAD_DIM + REST, True)
    k_ptr = k.ptr + b * k.batch + kv_head.to(tl.int64) * k.head
    v_ptr = v.ptr + b * v.batch + kv_head.to(tl.int64) * v.head
    slope = 0.0
    if score_args.alibi_slopes is not None:
        slope_at = score_args.alibi_slopes + b * score_args.alibi_slopes_batch + h
        slope = tl.load(slope_at, mask=q_real, other=0.0)[:, None]
    unit = unit_of(score_args, RAW)

    first_q = q_offset + tile * BLOCK_M // groups
    last_q = q_offset + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // groups, q_len - 1)
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N
    )
    if pages.positions is not None:  # a slot may hold any position: read all slots
        num_slots = k_len
        k_len = NO_LIMIT
        num_sinks, first, last = 0, 0, tl.cdiv(num_slots, BLOCK_N)
    elif spans is not None:
        num_sinks, first, last = 0, 0, tl.cdiv(num_slots, BLOCK_N)
    else:
        num_slots = k_len
    if (spans is not None) or (pages.positions is not None) or (mask_args.block_mask is not None):
        full_to = 0
    if block_lists.tiles is not None:
        block_list, _, last = block_list_at(block_lists, b, kv_head, tile)
        num_sinks, first = 0, 0
    begin, end = split_range(split, splits, first, last, num_sinks)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        if block_lists.tiles is not None:
            key_tile = tl.load(block_list + i)
        else:
            key_tile = tl.where(i < num_sinks, i, i - num_sinks + first)
        slots = key_tile * BLOCK_N + columns
        k_pos = slots
        if spans is not None:
            k_pos = tl.where(slots < num_slots, slot_positions(slots, spans), -1)
        k_at = slots.to(tl.int64) * k.row
        v_at = slots.to(tl.int64) * v.row
        if pages.table is not None:
            stored = slots < num_slots
            at = pages.table + b * pages.batch + kv_head * pages.head + slots // PAGE
            page = tl.load(at, mask=stored, other=0).to(tl.int64)
            inside = slots % PAGE
            k_at = page * pages.k_page + inside * k.row
            v_at = page * pages.v_page + inside * v.row
            if pages.positions is not None:
                k_pos = tl.load(pages.positions + page * PAGE + inside, mask=stored, other=-1)
        real = real_keys(mask_args, b, k_pos, k_len)
        k_tile = load_tile(k_ptr + k_at[:, None] + dims[None, :], real, dims, HEAD_DIM, True)
        v_tile = k_tile
        if not V_IN_K:
            v_tile = load_tile(v_ptr + v_at[:, None] + value_dims[None, :], real, value_dims,
                               VALUE_DIM, True)  # fmt: skip
        if REST > 0:
            k_rest = load_tile(k_ptr + k_at[:, None] + rest[None, :], real, rest,
                               HEAD_DIM + REST, True)  # fmt: skip
            qk = tl.dot(q_rest, k_rest.T, input_precision=PRECISION)
            qk = tl.dot(q_tile, k_tile.T, qk, input_precision=PRECISION)
        else:
            qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        s = scores_of(qk, score_args, slope, q_pos[:, None], k_pos[None, :], RAW)
        # A product that leads to another one straight away is not divided among warpgroups by its
        # columns: each would compute all of it.  This branch stands between the two.
        if not LATENT or (key_tile < full_from) | (key_tile >= full_to):
            mask = tile_mask(
                mask_args, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
                real[None, :], q_real[:, None], CAUSAL,
            )  # fmt: skip
            s = tl.where(mask, s, float("-inf"))
        m, l, p, rescale = online_softmax(m, l, s, unit)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    store_split(
        m, l, acc, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len,
        q_real, kv_heads * groups, value_dims, VALUE_DIM,
    )  # fmt: skip
