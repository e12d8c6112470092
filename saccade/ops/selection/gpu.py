"""Selections for a decoding step on a GPU: two kernels, where PyTorch's operators are some forty.

The first reads every summary once and writes scores, the second chooses for one row of the batch
and one KV head.  The position may be a tensor, so that one captured step serves every position.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.launching import on, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.selection.rule import BlockRule

SCORED = 32  # summaries of a program
MOST_BLOCKS = 1 << 14
MOST_ROWS = 64
"""Queries times heads of a group that a program holds."""


def suits(rule: BlockRule, q: Tensor, rows: Tensor, num_blocks: int) -> bool:
    """Whether the kernels select so: one block of few queries, the `top` blocks of not too many."""
    few = q.shape[2] <= rule.q_block and q.shape[1] // rows.shape[1] * q.shape[2] <= MOST_ROWS
    by_score = rule.summary != "none" and not rule.share
    return few and by_score and num_blocks <= MOST_BLOCKS and rows.shape[2] > 0


def select(
    rule: BlockRule, q: Tensor, rows: Tensor, q_offset: int | Tensor, num_blocks: int
) -> Tensor:
    """bool `[B, Hkv, 1, num_blocks]`; see `select_blocks`."""
    batch, heads, q_len, dim = q.shape
    kv_heads, count = rows.shape[1], min(rows.shape[2], num_blocks)
    q, rows = unit_rows(q), unit_rows(rows)
    scores = torch.empty(batch, kv_heads, count, dtype=torch.float32, device=q.device)
    shape = batch, kv_heads, 1, num_blocks
    allowed = torch.empty(shape, dtype=torch.bool, device=q.device)
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
        launch_kernel(
            choose_kernel,
            (batch * kv_heads,),
            scores,
            allowed.view(torch.uint8),
            q_offset,
            q_len,
            num_blocks,
            count,
            rule.k_block,
            rule.sinks,
            rule.window,
            rule.stride,
            rule.top,
            rule.least,
            BLOCK=next_power_of_two(num_blocks),
            DEVICE_OFFSET=isinstance(q_offset, Tensor),
        )
    return allowed


@triton.jit(do_not_specialize=["q_len", "count"])
def score_kernel(
    q, rows, scores, q_len, group, kv_heads, count,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK summaries for the sum of a group's queries, NaN as the lowest number."""
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
    found = tl.where(found > -3e38, found, -3e38)
    found = tl.where(found < 3e38, found, 3e38)
    tl.store(scores + tl.program_id(1).to(tl.int64) * count + block, found, mask=real)


@triton.jit
def _rank_that_reaches(rank, top):
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


@triton.jit(do_not_specialize=["q_offset", "q_len", "count", "sinks", "window", "top", "least"])
def choose_kernel(
    scores, allowed, q_offset, q_len, num_blocks, count, k_block, sinks, window, stride, top,
    least, BLOCK: tl.constexpr, DEVICE_OFFSET: tl.constexpr,
):  # fmt: skip
    """What one row and KV head reads: always some, and the `top` others with the highest scores."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    offset = q_offset
    if DEVICE_OFFSET:
        offset = tl.load(q_offset).to(tl.int32)
    always = (block < sinks) | (block > offset // k_block - window) | (block >= count)
    if stride > 0:
        always = always | (block % stride == 0)
    always = always | (offset + q_len < least)
    seen = block <= (offset + q_len - 1) // k_block
    others = seen & (always == 0)
    score = tl.load(scores + row * count + block, mask=others & (block < count), other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # an integer in the order of a float
    rank = order.to(tl.uint32, bitcast=True) ^ 0x80000000
    rank = tl.where(others, rank, 0)
    limit = _rank_that_reaches(rank, top)
    higher = others & (rank > limit)
    equal = others & (rank == limit)
    left = top - tl.sum(higher.to(tl.int32), 0)
    chosen = higher | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    chosen = (always & seen) | chosen
    tl.store(allowed + row * num_blocks + block, chosen.to(tl.uint8), mask=block < num_blocks)
