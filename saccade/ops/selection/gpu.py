"""Selections on a GPU: a few kernels, where PyTorch's operators are some forty.

A step is one kernel: programs read every summary once, and the last one of a row and KV head to end
its scores chooses.  Scores of a prompt are made by a kernel that sums queries and a product of
matrices; then each block of queries of a row and KV head is one program that chooses.  The position
may be a tensor: one captured step serves every position.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import cdiv, lanes_of, next_power_of_two
from saccade.ops.gpu.launching import on, pdl_options, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.triton_lang import pdl_begin
from saccade.ops.selection.rule import BlockRule
from saccade.ops.selection.turns import turns_of

SCORED = 32  # summaries of a program, twice as many where there are more than
FEW_SUMMARIES = 1024
SUMMED = 32  # queries that a program adds at a time
MOST_BLOCKS = 1 << 14
BLOCKS_OF_A_WARP = 128
MOST_ROWS = 64
"""Queries times heads of a group that a program holds, where one kernel makes the scores."""


def suits(rule: BlockRule, rows: Tensor, num_blocks: int) -> bool:
    """Whether the kernels select so: by scores, among not too many blocks."""
    return rule.summary != "none" and num_blocks <= MOST_BLOCKS and rows.shape[2] > 0


def select(
    rule: BlockRule, q: Tensor, rows: Tensor, q_offset: int | Tensor, num_blocks: int
) -> Tensor:
    """bool `[B, Hkv, q_blocks, num_blocks]`; see `select_blocks`."""
    batch, heads, q_len, _ = q.shape
    kv_heads, count = rows.shape[1], min(rows.shape[2], num_blocks)
    q, rows = unit_rows(q), unit_rows(rows)[:, :, :count]
    by_share = 0 < rule.share < 1
    shape = batch, kv_heads, cdiv(q_len, rule.q_block), num_blocks
    allowed = torch.empty(shape, dtype=torch.bool, device=q.device)
    few = q_len <= rule.q_block and heads // kv_heads * q_len <= MOST_ROWS and not by_share
    with on(q.device):
        turns = turns_of(q.device, batch * kv_heads) if few else None
        if turns is None:
            _choose(rule, q, _scores(rule, q, rows, by_share), allowed, q_offset, count)
        else:
            _select_at_once(rule, q, rows, turns, allowed, q_offset)
    return allowed


def _select_at_once(
    rule: BlockRule,
    q: Tensor,
    rows: Tensor,
    turns: Tensor,
    allowed: Tensor,
    q_offset: int | Tensor,
) -> None:
    (batch, heads, q_len, dim), (kv_heads, count) = q.shape, rows.shape[1:3]
    num_blocks, group = allowed.shape[3], heads // kv_heads
    scored = SCORED if count <= FEW_SUMMARIES else 2 * SCORED
    launch_kernel(
        select_kernel,
        (cdiv(count, scored), batch * kv_heads),
        strided(q),
        strided(rows),
        torch.empty(batch, kv_heads, count, dtype=torch.float32, device=q.device),
        allowed.view(torch.uint8),
        turns,
        q_offset,
        q_len,
        group,
        kv_heads,
        num_blocks,
        count,
        *_numbers(rule, num_blocks),
        rule.least,
        DIM=dim,
        BLOCK_D=next_power_of_two(dim),
        BLOCK_Q=next_power_of_two(group * q_len),
        SCORED=scored,
        BOUNDS=rule.summary == "bounds",
        BLOCK=lanes_of(num_blocks),
        DEVICE_OFFSET=isinstance(q_offset, Tensor),
        num_warps=8,
        **pdl_options(q.device),
    )


def _numbers(rule: BlockRule, num_blocks: int) -> tuple[int, ...]:
    """q_block, k_block, sinks, window, stride and top, as both kernels take them."""
    top = num_blocks if rule.share else rule.top
    return rule.q_block, rule.k_block, rule.sinks, rule.window, rule.stride, top


def _choose(
    rule: BlockRule,
    q: Tensor,
    scores: Tensor,
    allowed: Tensor,
    q_offset: int | Tensor,
    count: int,
) -> None:
    (batch, kv_heads, q_blocks, num_blocks), block = allowed.shape, lanes_of(allowed.shape[3])
    launch_kernel(
        choose_kernel,
        (q_blocks, batch * kv_heads),
        scores,
        allowed.view(torch.uint8),
        q_offset,
        q.shape[2],
        num_blocks,
        count,
        *_numbers(rule, num_blocks),
        float(rule.share),
        q.shape[3] ** -0.5,
        rule.least,
        HEADS=scores.shape[2],
        BLOCK=block,
        DEVICE_OFFSET=isinstance(q_offset, Tensor),
        BY_SHARE=0 < rule.share < 1,
        num_warps=min(16, block // BLOCKS_OF_A_WARP),
    )


def _scores(rule: BlockRule, q: Tensor, rows: Tensor, per_head: bool) -> Tensor:
    """float32 `[B, Hkv, group | 1, q_blocks, n]`: of sums of queries, over a group or per head."""
    (batch, heads, q_len, dim), kv_heads = q.shape, rows.shape[1]
    group, q_blocks = heads // kv_heads, cdiv(q_len, rule.q_block)
    each = group if per_head else 1
    shape = batch, kv_heads, each, q_blocks, rows.shape[3]
    pooled = torch.empty(shape, dtype=torch.float32, device=q.device)
    with on(q.device):
        launch_kernel(
            pool_kernel,
            (q_blocks, batch * kv_heads * each),
            strided(q),
            pooled,
            q_len,
            rule.q_block,
            kv_heads * each,
            group // each,
            DIM=dim,
            BLOCK_D=next_power_of_two(dim),
            ROWS=SUMMED,
            BOUNDS=rule.summary == "bounds",
        )
    return pooled @ rows.float().mT[:, :, None]


@triton.jit(do_not_specialize=["q_len"])
def pool_kernel(
    q, pooled, q_len, q_block, programs, heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """The sum of a block of queries of some heads; with BOUNDS of positive and negative parts."""
    block, b = tl.program_id(0), (tl.program_id(1) // programs).to(tl.int64)
    first = tl.program_id(1) % programs * heads
    dims, index = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    high, low = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    stop = tl.minimum((block + 1) * q_block, q_len)
    for head in range(heads):
        at = q.ptr + b * q.batch + (first + head).to(tl.int64) * q.head
        for start in range(block * q_block, stop, ROWS):
            row = start + index
            where = at + row.to(tl.int64)[:, None] * q.row + dims[None, :]
            keep = (row < stop)[:, None] & (dims < DIM)[None, :]
            x = tl.load(where, mask=keep, other=0.0).to(tl.float32)
            if BOUNDS:
                high += tl.sum(tl.maximum(x, 0.0), 0)
                low += tl.sum(tl.minimum(x, 0.0), 0)
            else:
                high += tl.sum(x, 0)
    width: tl.constexpr = 2 * DIM if BOUNDS else DIM
    to = pooled + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * width + dims
    tl.store(to, high, mask=dims < DIM)
    if BOUNDS:
        tl.store(to + DIM, low, mask=dims < DIM)


@triton.jit
def _score(
    q, rows, scores, q_len, group, kv_heads, count,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, SCORED: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Scores of SCORED summaries for the sum of a group's queries."""
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    dims, each = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
    block = tl.program_id(0) * SCORED + tl.arange(0, SCORED)
    inside, real = dims < DIM, block < count
    head = (kv_head * group + each // q_len).to(tl.int64)
    q_at = q.ptr + b * q.batch + head * q.head + (each % q_len).to(tl.int64) * q.row
    keep = (each < group * q_len)[:, None] & inside[None, :]
    x = tl.load(q_at[:, None] + dims[None, :], mask=keep, other=0.0).to(tl.float32)
    row_at = rows.ptr + b * rows.batch + kv_head.to(tl.int64) * rows.head
    at = row_at + block.to(tl.int64)[:, None] * rows.row + dims[None, :]
    mask = real[:, None] & inside[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if BOUNDS:
        high, low = tl.sum(tl.maximum(x, 0.0), 0), tl.sum(tl.minimum(x, 0.0), 0)
        second = tl.load(at + DIM, mask=mask, other=0.0).to(tl.float32)
        found = tl.sum(first * high[None, :] + second * low[None, :], 1)
    else:
        found = tl.sum(first * tl.sum(x, 0)[None, :], 1)
    tl.store(scores + tl.program_id(1).to(tl.int64) * count + block, found, mask=real)


@triton.jit
def _rank_of(x):
    """A number in the order of float32 numbers, as an unsigned integer."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _highest(rank, others, top):
    """The `top` others with the highest ranks, of equal ones the first; all where they are fewer.

    The rank that they reach is searched two bits at a time until just as many do.  The counts of
    the three numbers that are tried share one sum, in 16 bits each.
    """
    found, step = tl.cast(0, tl.uint32), tl.cast(1 << 30, tl.uint32)
    reached = tl.sum(others.to(tl.int64), 0)
    while (reached > top) & (step > 0):
        counts = (rank >= found + step).to(tl.int64)
        counts += (rank >= found + 2 * step).to(tl.int64) << 16
        counts += (rank >= found + 3 * step).to(tl.int64) << 32
        total = tl.sum(counts, 0)
        for i in tl.static_range(1, 4):
            count = (total >> (16 * (i - 1))) & 0xFFFF
            found = tl.where(count >= top, found + step, found)
            reached = tl.where(count >= top, count, reached)
        step = step >> 2
    chosen = others & (rank >= found)
    if reached > top:
        equal = chosen & (rank == found)
        left = top - tl.sum((rank > found).to(tl.int32), 0)
        chosen = (others & (rank > found)) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    return chosen


@triton.jit
def _rank_of_share(rank, weights, share):
    """The largest number such that the weights whose ranks reach it sum up to `share`."""
    found = tl.full([1], 0, tl.uint32)
    for i in tl.static_range(32):
        at = found + tl.full([1], 1 << (31 - i), tl.uint32)
        found = tl.where(tl.sum(tl.where(rank >= at, weights, 0.0), 0) >= share, at, found)
    return found


@triton.jit
def _weights(at, step, others, factor, HEADS: tl.constexpr):
    """Softmax over the others of each head's scores, a mean over the heads."""
    block = tl.arange(0, others.shape[0])
    found = tl.zeros_like(block).to(tl.float32)
    for head in range(HEADS):
        score = tl.load(at + head * step + block, mask=others, other=float("-inf")) * factor
        score = tl.where(score > -3e38, score, float("-inf"))  # NaN too
        top = tl.maximum(tl.max(score, 0), -3e38)
        weight = tl.exp(score - top)
        found += weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    return found / HEADS


@triton.jit
def _chosen(
    line, step, first, offset, q_len, count, q_block, k_block, sinks, window, stride, top, share,
    scale, least, HEADS: tl.constexpr, BLOCK: tl.constexpr, BY_SHARE: tl.constexpr,
):  # fmt: skip
    """What one block of queries of a row and KV head reads: always some, and the best others.

    The best are the `top` with the highest scores, or BY_SHARE the fewest that hold `share` of the
    weights of a softmax.

    Args:
        line: scores of the blocks for the first head; step: between those of the heads.
        first: the first query; offset: the position of query 0.
    """
    queries = tl.minimum(q_len - first, q_block)
    block = tl.arange(0, BLOCK)
    at = offset + first  # position of the first query
    always = (block < sinks) | (block > at // k_block - window) | (block >= count)
    if stride > 0:
        always = always | (block % stride == 0)
    always = always | (offset + q_len < least)
    seen = block <= (at + queries - 1) // k_block
    others = seen & (always == 0)
    if BY_SHARE:
        value = _weights(line, step, others, scale / queries, HEADS)
    else:
        # Other programs of the same launch may have written them: not through the L1 cache.
        value = tl.load(line + block, mask=others, other=0.0, cache_modifier=".cg")
        value = tl.where(value > -3e38, value, -3e38)  # NaN too
        value = tl.where(value < 3e38, value, 3e38)
    rank = tl.where(others, _rank_of(value), 0)
    if BY_SHARE:
        limit = _rank_of_share(rank, value, share)
        held = tl.sum(tl.where(rank > limit, value, 0.0), 0)
        highest = tl.max(tl.where(rank <= limit, value, 0.0), 0)  # the weight at the limit
        left = tl.ceil((share - held) / tl.maximum(highest, 1e-30)).to(tl.int32)
        equal = others & (rank == limit)
        chosen = equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)
        chosen = (others & (rank > limit)) | chosen
    else:
        chosen = _highest(rank, others, top)
    return chosen | (always & seen)


@triton.jit(do_not_specialize=["q_offset", "q_len", "count", "sinks", "window", "top", "least"])
def choose_kernel(
    scores, allowed, q_offset, q_len, num_blocks, count, q_block, k_block, sinks, window, stride,
    top, share, scale, least,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, DEVICE_OFFSET: tl.constexpr, BY_SHARE: tl.constexpr,
):  # fmt: skip
    """What one block of queries of a row and KV head reads."""
    q_blocks, row = tl.num_programs(0), tl.program_id(1).to(tl.int64)
    offset = q_offset
    if DEVICE_OFFSET:
        offset = tl.load(q_offset).to(tl.int32)
    step = q_blocks.to(tl.int64) * count
    line = scores + row * HEADS * step + tl.program_id(0).to(tl.int64) * count
    chosen = _chosen(
        line, step, tl.program_id(0) * q_block, offset, q_len, count, q_block, k_block, sinks,
        window, stride, top, share, scale, least, HEADS, BLOCK, BY_SHARE,
    )  # fmt: skip
    block = tl.arange(0, BLOCK)
    to = allowed + (row * q_blocks + tl.program_id(0)) * num_blocks + block
    tl.store(to, chosen.to(tl.uint8), mask=block < num_blocks)


@triton.jit(do_not_specialize=["q_offset", "q_len", "count", "sinks", "window", "top", "least"])
def select_kernel(
    q, rows, scores, allowed, turns, q_offset, q_len, group, kv_heads, num_blocks, count, q_block,
    k_block, sinks, window, stride, top, least,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, SCORED: tl.constexpr,
    BOUNDS: tl.constexpr, BLOCK: tl.constexpr, DEVICE_OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Both at once, for one block of queries: the last program of a head to end its scores chooses.

    Args:
        turns: int32 zeros for each row and KV head, how many of its programs have ended; they are
            zeros again at the end.
    """
    pdl_begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    _score(q, rows, scores, q_len, group, kv_heads, count, DIM, BLOCK_D, BLOCK_Q, SCORED, BOUNDS)
    tl.debug_barrier()  # all warps have stored theirs before one of them says so
    ended = tl.atomic_add(turns + row, 1, sem="acq_rel")
    if ended == tl.num_programs(0) - 1:
        offset = q_offset
        if DEVICE_OFFSET:
            offset = tl.load(q_offset).to(tl.int32)
        chosen = _chosen(
            scores + row * count, 0, 0, offset, q_len, count, q_block, k_block, sinks, window,
            stride, top, 0.0, 0.0, least, 1, BLOCK, False,
        )  # fmt: skip
        block = tl.arange(0, BLOCK)
        tl.store(allowed + row * num_blocks + block, chosen.to(tl.uint8), mask=block < num_blocks)
        tl.store(turns + row, 0)
