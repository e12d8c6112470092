"""Selecting blocks by a rule: in plain PyTorch on any device, by C++ on a CPU, by Triton on a GPU.

A block of queries is represented by the sum of its queries over the heads that share a KV head, so
that one selection serves the group and its keys are read once.  Its score for a block of keys is

    mean      q . mean(k)
    bounds    sum_d max(q_d max_d(k), q_d min_d(k)), summed over the queries (Quest, 2406.10774):
              no key of the block has a higher sum of scores
    keys      the sum of the softmax weights of its keys, over queries and heads: exact
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.core import BlockSelection
from saccade.ops.gpu.support import has_triton
from saccade.ops.planning import planning
from saccade.ops.selection import native
from saccade.ops.selection.mass import block_mass
from saccade.ops.selection.rule import BlockRule


def select_blocks(
    rule: BlockRule,
    q: Tensor,
    rows: Tensor | None,
    q_offset: int | Tensor,
    num_keys: int,
    real: Tensor | None = None,
) -> BlockSelection:
    """The blocks that a rule selects among those before and at the queries.

    Args:
        q: `[B, H, Lq, D]`, after RoPE.
        rows: summaries of the first blocks `[B, Hkv, n, width]`, see `summarize`; later blocks are
            always read.  None for a rule without summaries, whose selection all rows share.
            For a rule by "keys" the keys themselves, `[B, Hkv, num_keys, D]`.
        q_offset: position of the first query; in a captured step an int64 scalar on the device,
            and then rows behind the blocks before it may hold anything.
        num_keys: one past the last position of the keys; in a captured step room for how many.
        real: for a rule by "keys", bool `[B, Hkv | 1, num_keys]`, False where there is no key.

    Raises:
        ValueError: `rows` that do not fit to the rule and the queries.
    """
    _check_rows(rule, q, rows)
    num_blocks = -(-num_keys // rule.k_block)
    if isinstance(q_offset, int) and num_keys < rule.least:
        rule = replace(rule, window=num_blocks + 1)
    if rule.summary != "keys" and _runs_triton(q, rows):
        from saccade.ops.selection import gpu

        if rows is not None and gpu.suits(rule, rows, num_blocks):
            allowed = gpu.select(rule, q, rows, q_offset, num_blocks)
            return BlockSelection(allowed=allowed, q_block=rule.q_block, k_block=rule.k_block)
    if isinstance(q_offset, int) and real is None and native.usable(q, rows):
        allowed = native.select(rule, q, rows, q_offset, num_blocks)
    else:
        allowed = _select(rule, q, rows, q_offset, num_blocks, real)
    return BlockSelection(allowed=allowed, q_block=rule.q_block, k_block=rule.k_block)


def _runs_triton(q: Tensor, rows: Tensor | None) -> bool:
    """Whether Triton kernels can read these tensors, which nothing watches."""
    if rows is None or torch.compiler.is_compiling() or planning() or not has_triton(q.device):
        return False
    return all(type(x) is Tensor and not x.requires_grad for x in (q, rows))


def _check_rows(rule: BlockRule, q: Tensor, rows: Tensor | None) -> None:
    if rule.summary == "none":
        return
    width = q.shape[3] * (2 if rule.summary == "bounds" else 1)
    if rows is None or rows.shape[0] != q.shape[0] or rows.shape[3] != width:
        found = None if rows is None else list(rows.shape)
        raise ValueError(
            f"a selection by {rule.summary} needs summaries [{q.shape[0]}, kv_heads, blocks, "
            f"{width}], got {found}. Make them by saccade.ops.selection.summarize."
        )


def _select(
    rule: BlockRule,
    q: Tensor,
    rows: Tensor | None,
    q_offset: int | Tensor,
    num_blocks: int,
    real: Tensor | None,
) -> Tensor:
    """bool `[B | 1, Hkv | 1, q_blocks, num_blocks]`, without waiting for the device."""
    always, seen = always_read(rule, q, q_offset, num_blocks)
    if rows is None or rule.summary == "none":
        return always[None, None]
    if rule.summary == "keys":
        return _by_mass(rule, q, rows, q_offset, always[None, None], seen, real)
    blocks = torch.arange(num_blocks, device=q.device)
    summarized = min(rows.shape[2], num_blocks)
    always = (always | (blocks >= summarized)) & seen
    others = (seen & ~always)[:, :summarized]
    if rule.share:
        chosen = _by_share(rule, q, rows[:, :, :summarized], others)
    else:
        chosen = _by_score(rule, q, rows[:, :, :summarized], others)
    missing = num_blocks - summarized
    return always | torch.nn.functional.pad(chosen, (0, missing))


def always_read(
    rule: BlockRule, q: Tensor, q_offset: int | Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Blocks that each block of queries always reads, and those that it sees; bool `[q_blocks, n]`.

    The arguments are those of `select_blocks`; `num_blocks` is the number of blocks of keys.
    """
    length, device = q.shape[2], q.device
    starts = torch.arange(0, length, rule.q_block, device=device)[:, None]
    own = (q_offset + starts) // rule.k_block
    last = (q_offset + (starts + rule.q_block).clamp_max(length) - 1) // rule.k_block
    blocks = torch.arange(num_blocks, device=device)
    always = (blocks < rule.sinks) | (blocks > own - rule.window)
    if rule.stride:
        always |= blocks % rule.stride == 0
    if isinstance(q_offset, Tensor) and rule.least:
        always |= q_offset + length < rule.least
    seen = blocks <= last
    return always & seen, seen


def _by_mass(
    rule: BlockRule,
    q: Tensor,
    k: Tensor,
    q_offset: int | Tensor,
    always: Tensor,
    seen: Tensor,
    real: Tensor | None,
) -> Tensor:
    """What is always read, sinks being the first real keys, and the `top` others by weight."""
    if real is not None:
        first = real.int().argmax(-1)[..., None, None] // rule.k_block
        blocks = torch.arange(seen.shape[1], device=q.device)
        always = always | ((blocks >= first) & (blocks < first + rule.sinks) & seen)
    mass = block_mass(q, k, q_offset, rule.k_block, real)
    return always | _highest(_by_blocks(mass, rule.q_block).sum(3), rule.top, seen & ~always)


def _by_score(rule: BlockRule, q: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """The `top` others with the highest scores."""
    pooled = _pooled(q, rows.shape[1], rule).sum(2)
    return _highest(pooled @ rows.float().mT, rule.top, others)


def _highest(scores: Tensor, top: int, others: Tensor) -> Tensor:
    scores = scores.nan_to_num(nan=-torch.inf).masked_fill(~others, -torch.inf)
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, value=True) & others


def _by_share(rule: BlockRule, q: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """The fewest others that hold the share of the estimated attention, a mean over the heads."""
    if rule.share >= 1:
        return others.expand(q.shape[0], rows.shape[1], -1, -1)
    starts = torch.arange(0, q.shape[2], rule.q_block, device=q.device)
    counts = (q.shape[2] - starts).clamp_max(rule.q_block)
    pooled = _pooled(q, rows.shape[1], rule) / counts[:, None] * q.shape[3] ** -0.5
    scores = (pooled @ rows.float().mT[:, :, None]).nan_to_num(nan=-torch.inf)
    weights = scores.masked_fill(~others, -torch.inf).softmax(-1).nan_to_num(0).mean(2)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    wanted = ordered.cumsum(-1) - ordered < rule.share
    return torch.zeros_like(wanted).scatter(-1, order, wanted) & others


def _pooled(q: Tensor, kv_heads: int, rule: BlockRule) -> Tensor:
    """Sums of the queries of each block: float32 `[B, Hkv, group, q_blocks, width]`."""
    x = q.unflatten(1, (kv_heads, -1))
    if rule.summary == "bounds":
        x = torch.cat((x.clamp_min(0), x.clamp_max(0)), dim=-1)
    return _by_blocks(x, rule.q_block).sum(4, dtype=torch.float32)


def _by_blocks(x: Tensor, q_block: int) -> Tensor:
    """`[..., Lq, width]` as `[..., q_blocks, q_block, width]`, with zeros for missing queries."""
    missing = -x.shape[-2] % q_block
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(-2, (-1, q_block))
