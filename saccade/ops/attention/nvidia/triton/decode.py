"""A few queries against long storage, on GPUs: the work is to read the cache once.

The query heads of a group, times the queries, are the rows of one matrix: row r is query
r // groups of head r % groups, so keys are read once for all of them and rows of a tile lie close
together.  The keys are cut into splits, one program each; `merge_kernel` joins what they found.
The same kernel serves prefill over storage that is not dense, with more tiles of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops.gpu.triton_lang import (
    LN2,
    LOG2E,
    LOWEST,
    block_list_at,
    extent,
    finish,
    key_tiles,
    load_tile,
    online_softmax,
    real_keys,
    scores_of,
    unit_of,
    visible,
)

FAR = tl.constexpr(2**30)  # past every position


class Pages(NamedTuple):
    """How slots of a row are found: `table` is None where they lie one after the other.

    Attributes:
        table: int32 `[B, Hkv]` rows of page numbers, with strides batch and head.
        k_page, v_page: strides from page to page.
        positions: int32 `[pages, page size]`, what position a slot holds, or None.
    """

    table: Any = None
    batch: Any = None
    head: Any = None
    k_page: Any = None
    v_page: Any = None
    positions: Any = None


@triton.jit
def pdl_begin(PDL: tl.constexpr):
    """Programmatic dependent launch: a kernel starts before the one before it has ended.

    Everything that is read or written comes after the wait, which lasts until the kernel before,
    and so all kernels before that one, have ended and their results can be seen.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def slot_positions(slots, spans):
    """Position of each slot of a ring: `spans` lists (slot, position, length) flat; -1 is empty."""
    k_pos = tl.full(slots.shape, -1, tl.int32)
    for i in tl.static_range(len(spans) // 3):
        at = slots - spans[3 * i]
        k_pos = tl.where((at >= 0) & (at < spans[3 * i + 2]), at + spans[3 * i + 1], k_pos)
    return k_pos


@triton.jit
def share_of(split, splits, first, last, num_sinks):
    """Which of the visited tiles a split takes, as a range of the list sinks + [first, last)."""
    count = num_sinks + last - first
    each = tl.cdiv(count, splits)
    return tl.minimum(split * each, count), tl.minimum((split + 1) * each, count)


@triton.jit(do_not_specialize=["spans", "q_len", "k_len", "num_slots", "q_offset"])
def decode_kernel(
    q,
    k,
    v,
    out,
    lse,
    pages,
    spans,
    seqlen_info,
    mask_args,
    score_args,
    block_lists,
    q_len,
    k_len,
    num_slots,
    q_offset,
    splits,
    out_split,
    lse_split,
    kv_heads,
    groups,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """(out, lse) of one split: out is a Plane, with strides out_split, lse_split between splits."""
    pdl_begin(PDL)
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    _, _, _, k_len, q_offset, _ = extent(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset)
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
    k_ptr = k.ptr + b * k.batch + kv_head.to(tl.int64) * k.head
    v_ptr = v.ptr + b * v.batch + kv_head.to(tl.int64) * v.head
    slope = 0.0
    if score_args.slopes is not None:
        slope = tl.load(
            score_args.slopes + b * score_args.slopes_batch + h, mask=q_real, other=0.0
        )[:, None]
    unit = unit_of(score_args, RAW)

    first_q = q_offset + tile * BLOCK_M // groups
    last_q = q_offset + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // groups, q_len - 1)
    num_sinks, first, _, _, last = key_tiles(first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N)
    if pages.positions is not None:  # a slot may hold any position: visit all
        num_slots = k_len
        k_len = FAR
        num_sinks, first, last = 0, 0, tl.cdiv(num_slots, BLOCK_N)
    elif spans is not None:
        num_sinks, first, last = 0, 0, tl.cdiv(num_slots, BLOCK_N)
    else:
        num_slots = k_len
    if block_lists.tiles is not None:
        visited, _, last = block_list_at(block_lists, b, kv_head, tile)
        num_sinks, first = 0, 0
    begin, end = share_of(split, splits, first, last, num_sinks)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        if block_lists.tiles is not None:
            start = tl.load(visited + i) * BLOCK_N
        else:
            start = tl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK_N
        slots = start + columns
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
        v_tile = load_tile(v_ptr + v_at[:, None] + value_dims[None, :], real, value_dims,
                           VALUE_DIM, True)  # fmt: skip
        qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        s = scores_of(qk, score_args, slope, q_pos[:, None], k_pos[None, :], RAW)
        see = visible(
            mask_args, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
            real[None, :], q_real[:, None], CAUSAL,
        )  # fmt: skip
        s = tl.where(see, s, float("-inf"))
        m, l, p, shrink = online_softmax(m, l, s, unit)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    store_split(
        m, l, acc, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims, VALUE_DIM,
    )  # fmt: skip


@triton.jit
def store_split(
    m,
    l,
    acc,
    unit,
    out,
    lse,
    score_args,
    split,
    out_split,
    lse_split,
    b,
    h,
    index,
    q_len,
    q_real,
    heads,
    value_dims,
    VALUE_DIM: tl.constexpr,
):
    """Write the output and lse of a split; the learned sink belongs to the first."""
    if score_args.sinks is not None:
        sink = tl.load(score_args.sinks + h, mask=q_real & (split == 0), other=float("-inf"))
        acc, row_lse = finish(m, l, acc, unit, sink)
    else:
        acc, row_lse = finish(m, l, acc, unit, None)
    row = h.to(tl.int64) * out.head + index.to(tl.int64) * out.row
    at = out.ptr + split.to(tl.int64) * out_split + b * out.batch + row
    keep = q_real[:, None] & (value_dims < VALUE_DIM)[None, :]
    acc = acc.to(out.ptr.dtype.element_ty)
    tl.store(at[:, None] + value_dims[None, :], acc, mask=keep)
    lse_at = lse + split.to(tl.int64) * lse_split + (b * heads + h) * q_len + index
    tl.store(lse_at, row_lse, mask=q_real)


@triton.jit
def weighed(found, part, m, total, acc):
    """(largest lse, sum of weights, weighted sum of outputs) with the splits of a block more."""
    found = found * LOG2E
    m_new = tl.maximum(m, tl.max(found, 0))
    weight = tl.exp2(found - m_new)
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(weight, 0)
    return m_new, total, acc * shrink + tl.sum(part * weight[:, None], 0)


@triton.jit
def merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    splits,
    part_split,
    lse_split,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = sum over splits of exp(lse_s - lse) out_s; one program a row and BLOCK_V channels.

    Addresses are ready before the kernel before has ended; ONCE: BLOCK_S splits are all.
    """
    row = tl.program_id(0).to(tl.int64)
    value_dims = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    held = value_dims < VALUE_DIM
    split = tl.arange(0, BLOCK_S)
    there = split < splits
    lse_at = part_lse + split.to(tl.int64) * lse_split + row
    at = parts + split.to(tl.int64)[:, None] * part_split + row * VALUE_DIM + value_dims[None, :]
    out_at, to = out + row * VALUE_DIM + value_dims, lse + row + tl.arange(0, 1)
    m = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_V], tl.float32)
    if PDL:  # the kernel behind may start at once: it waits for this one, which waits itself
        gdc_launch_dependents()
        gdc_wait()
    found = tl.load(lse_at, mask=there, other=float("-inf"))
    part = tl.load(at, mask=there[:, None] & held[None, :], other=0.0)
    m, total, acc = weighed(found, part, m, total, acc)
    if not ONCE:
        for start in range(BLOCK_S, splits, BLOCK_S):
            there = split < splits - start
            far = tl.cast(start, tl.int64)
            found = tl.load(lse_at + far * lse_split, mask=there, other=float("-inf"))
            part = tl.load(at + far * part_split, mask=there[:, None] & held[None, :], other=0.0)
            m, total, acc = weighed(found, part, m, total, acc)
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    tl.store(out_at, (acc / safe).to(out.dtype.element_ty), mask=held)
    tl.store(to, tl.where(empty, float("-inf"), (m + tl.log2(safe)) * LN2))
