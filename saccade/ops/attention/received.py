"""What each key receives: the weights that queries give it, summed or the largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.core import AttentionOutput, KeyRange, QuantizedKV, Unsupported
from saccade.core.kv import KVTile
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import attend
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu import backend as cpu
from saccade.ops.attention.masks import bias_of, seen_kv, visible_pairs

FEW = 8
"""Rows of a KV head that the C++ kernels decode (kDecodeRows)."""
TILE = 128
"""Keys whose scores by all queries of a call stay in the nearer caches of a CPU."""


def attend_received(
    call: AttentionCall, *, backend: str = "auto", largest: bool = False
) -> tuple[AttentionOutput, Tensor]:
    """`attend`, and what each key received from the queries of its KV head.

        received[b, g, j] = sum_i mean_{h in group g} exp(score[b, h, i, j] - lse[b, h, i])

    or, for `largest`, the maximum over i and h of the same weights; score and lse are those of the
    call, with its mask, softcap, bias, learned sinks and block selection.  Policies that keep the
    keys which received most (H2O, arXiv 2306.14048; KVzip, arXiv 2505.23416) score by it.

    The C++ kernels take the weights from the attention that they compute, at about a twentieth of
    its time (csrc/received.h); other backends are followed by `received_of`.  Memory: the kernels
    keep the weights of one block of queries a thread, 1 MiB or those of 96 rows.

    Args:
        call: with any view of keys, not packed (`cu_seqlens`).
        backend: as for `attend`.

    Returns:
        The output of `attend`, and float32 `[B, Hkv, end]` by the positions of keys, `end` one past
        the last; 0 where there is none.

    Raises:
        ValueError, Unsupported: as `attend`; packed sequences.
    """
    if call.cu_seqlens is not None:
        raise Unsupported(
            "what keys receive is not computed for packed sequences (cu_seqlens). Make a call of "
            "each sequence."
        )
    if _in_kernels(call, backend):
        return cpu.run_received(call, largest=largest)
    result = attend(call, backend=backend)
    return result, received_of(call, result.lse.detach(), largest=largest)


def _in_kernels(call: AttentionCall, backend: str) -> bool:
    """Whether the C++ kernels compute both at once."""
    if backend not in ("auto", "cpu") or not call.q.is_cpu or call.needs_grad:
        return False
    behind = isinstance(call.kv, QuantizedKV) and call.kv.first > 0
    if torch.compiler.is_compiling() or behind:
        return False
    if call.q.shape[2] * call.num_groups <= FEW and backend == "auto":
        return False  # decoding has kernels of its own, whose output has other last bits
    return dispatch.choose(call, backend) is dispatch.load("cpu")


def received_of(
    call: AttentionCall,
    lse: Tensor,
    ranges: Sequence[KeyRange] | None = None,
    *,
    largest: bool = False,
) -> Tensor:
    """What each key of a call that was run received, float32 `[B, Hkv, end]`; the formula.

    See `attend_received`.  Scores are computed again, a tile of keys at a time: memory is
    O(length).

    Args:
        call: not packed (`cu_seqlens`).
        lse: `[B, H, t]`, as the operator returned it.
        ranges: of positions to score, ascending; others get 0.  None: all that the call reads.
        largest: the largest weight of all queries and heads instead of the sum.
    """
    call = call.transformed()  # the keys of the tiles are as they are stored
    batch, kv_heads, end, _, _ = call.kv.shape
    found = torch.zeros(batch, kv_heads, end, device=call.q.device)
    if ranges is None:
        ranges = call.mask.key_ranges(*call.q_bounds(0, call.q.shape[2]), end)
    norm = lse.unflatten(1, (-1, call.num_groups))[..., None]
    for tile in call.kv.tiles(ranges, TILE):
        scores, visible = attention_scores(call, tile)
        scores = scores.float().sub_(norm)
        if not visible.all():
            scores = scores.masked_fill(~visible, -torch.inf)
        if largest:
            received = scores.amax((2, 3)).exp_()
        else:
            received = scores.exp_().sum(3).mean(2)
        at = tile.positions.clamp_min(0).expand(received.shape)
        found.scatter_add_(2, at, received)  # each key once; where a head has none: 0
    return found


def attention_scores(call: AttentionCall, tile: KVTile) -> tuple[Tensor, Tensor]:
    """Scores of all queries on the keys of a tile `[B, Hkv, G, Lq, t]`, and which are visible."""
    length = call.q.shape[2]
    q = call.queries(0, length).unflatten(1, (-1, call.num_groups))
    visible = visible_pairs(call, 0, length, tile)
    k, _ = seen_kv(call, tile, visible, q.dtype)
    scores = (q * call.scale) @ k[:, :, None].mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    bias = bias_of(call, 0, length, tile)
    return (scores if bias is None else scores + bias), visible
