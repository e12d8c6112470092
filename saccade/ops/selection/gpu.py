"""Selections on a GPU: a few kernels, where PyTorch's operators are some forty.

Scores of a step are made by one kernel that reads every summary once; those of a prompt by a kernel
that sums queries and a product of matrices.  Then each block of queries of a row and KV head is one
program that chooses.  The position may be a tensor: one captured step serves every position.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import cdiv, lanes_of, next_power_of_two
from saccade.ops.gpu.launching import on, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.selection.rule import BlockRule

SCORED = 32  # summaries of a program
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
    batch, heads, q_len, dim = q.shape
    kv_heads, count = rows.shape[1], min(rows.shape[2], num_blocks)
    q, rows = unit_rows(q), unit_rows(rows)[:, :, :count]
    by_share = 0 < rule.share < 1
    few = q_len <= rule.q_block and heads // kv_heads * q_len <= MOST_ROWS and not by_share
    scores = _scores_of_step(rule, q, rows) if few else _scores(rule, q, rows, by_share)
    q_blocks, block = cdiv(q_len, rule.q_block), lanes_of(num_blocks)
    shape = batch, kv_heads, q_blocks, num_blocks
    allowed = torch.empty(shape, dtype=torch.bool, device=q.device)
    with on(q.device):
        launch_kernel(
            choose_kernel,
            (q_blocks, batch * kv_heads),
            scores,
            allowed.view(torch.uint8),
            q_offset,
            q_len,
            num_blocks,
            count,
            rule.q_block,
            rule.k_block,
            rule.sinks,
            rule.window,
            rule.stride,
            num_blocks if rule.share else rule.top,
            float(rule.share),
            dim**-0.5,
            rule.least,
            HEADS=scores.shape[2],
            BLOCK=block,
            DEVICE_OFFSET=isinstance(q_offset, Tensor),
            BY_SHARE=by_share,
            num_warps=min(16, block // BLOCKS_OF_A_WARP),
        )
    return allowed


def _scores_of_step(rule: BlockRule, q: Tensor, rows: Tensor) -> Tensor:
    """float32 `[B, Hkv, 1, 1, n]`: of one block of queries, summed over the heads of a group."""
    (batch, heads, q_len, dim), (kv_heads, count) = q.shape, rows.shape[1:3]
    shape = batch, kv_heads, 1, 1, count
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    with on(q.device):
        launch_kernel(
            score_kernel,
            (cdiv(count, SCORED), batch * kv_heads),
            strided(q),
            strided(rows),
            scores,
            q_len,
            group,
            kv_heads,
            count,
            DIM=dim,
            BLOCK_D=next_power_of_two(dim),
            BLOCK_Q=next_power_of_two(group * q_len),
            BLOCK=SCORED,
            BOUNDS=rule.summary == "bounds",
        )
    return scores


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


@triton.jit(do_not_specialize=["q_len", "count"])
def score_kernel(
    q, rows, scores, q_len, group, kv_heads, count,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK summaries for the sum of a group's queries."""
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    dims, each = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
def _rank_of_count(rank, top):
    """The largest number that at least `top` ranks reach, two bits at a time.

    The counts of the three numbers that are tried share one sum, in 16 bits each.
    """
    found = tl.full([1], 0, tl.uint32)
    for i in tl.static_range(16):
        step = tl.full([1], 1 << (30 - 2 * i), tl.uint32)
        counts = (rank >= found + step).to(tl.int64)
        counts += (rank >= found + 2 * step).to(tl.int64) << 16
        counts += (rank >= found + 3 * step).to(tl.int64) << 32
        total = tl.sum(counts, 0)
        found = tl.where((total & 0xFFFF) >= top, found + step, found)
        found = tl.where(((total >> 16) & 0xFFFF) >= top, found + step, found)
        found = tl.where((total >> 32) >= top, found + step, found)
    return found


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


@triton.jit(do_not_specialize=["q_offset", "q_len", "count", "sinks", "window", "top", "least"])
def choose_kernel(
    scores, allowed, q_offset, q_len, num_blocks, count, q_block, k_block, sinks, window, stride,
    top, share, scale, least,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, DEVICE_OFFSET: tl.constexpr, BY_SHARE: tl.constexpr,
):  # fmt: skip
    """What one block of queries of a row and KV head reads: always some, and the best others.

    The best are the `top` with the highest scores, or BY_SHARE the fewest that hold `share` of the
    weights of a softmax.
    """
    q_blocks, row = tl.num_programs(0), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * q_block
    queries = tl.minimum(q_len - first, q_block)
    block = tl.arange(0, BLOCK)
    offset = q_offset
    if DEVICE_OFFSET:
        offset = tl.load(q_offset).to(tl.int32)
    at = offset + first  # position of the first query
    always = (block < sinks) | (block > at // k_block - window) | (block >= count)
    if stride > 0:
        always = always | (block % stride == 0)
    always = always | (offset + q_len < least)
    seen = block <= (at + queries - 1) // k_block
    others = seen & (always == 0)
    step = q_blocks.to(tl.int64) * count
    line = scores + row * HEADS * step + tl.program_id(0).to(tl.int64) * count
    if BY_SHARE:
        value = _weights(line, step, others, scale / queries, HEADS)
    else:
        value = tl.load(line + block, mask=others, other=0.0)
        value = tl.where(value > -3e38, value, -3e38)  # NaN too
        value = tl.where(value < 3e38, value, 3e38)
    rank = tl.where(others, _rank_of(value), 0)
    if BY_SHARE:
        limit = _rank_of_share(rank, value, share)
        held = tl.sum(tl.where(rank > limit, value, 0.0), 0)
        highest = tl.max(tl.where(rank <= limit, value, 0.0), 0)  # the weight at the limit
        left = tl.ceil((share - held) / tl.maximum(highest, 1e-30)).to(tl.int32)
    else:
        limit = _rank_of_count(rank, top)
        left = top - tl.sum((rank > limit).to(tl.int32), 0)
    equal = others & (rank == limit)
    chosen = equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)
    chosen = (others & (rank > limit)) | chosen | (always & seen)
    to = allowed + (row * q_blocks + tl.program_id(0)) * num_blocks + block
    tl.store(to, chosen.to(tl.uint8), mask=block < num_blocks)
