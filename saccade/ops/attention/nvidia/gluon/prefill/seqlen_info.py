"""Sequence lengths in the prefill kernel: packed sequences, per-row key lengths, paged keys.

TMA loads full tiles, so keys past the end of a sequence are loaded too: those of the next packed
sequence, or whatever an unfinished page holds.  Their scores are masked like any other, and their
values are overwritten with zeros (`zero_v_tail`), because a weight of 0 times NaN is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from saccade.core.host_memo import capturing
from saccade.ops.attention.checks import numbers
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import cdiv

MAX_TABLES = 16  # tables of query tiles that are kept, 32 bytes a tile each


class VarlenInfo(NamedTuple):
    """What differs from sequence to sequence; every field may be None.

    Attributes:
        q_offsets: int64 `[B]`, position of each row's first query.
        kv_lens: int32 or int64 `[B]`, keys of each row; kv_lens_stride: its stride.
        q_tiles: int32 `[tiles, 8]`, of packed sequences: first query, number of queries, first key
            and number of keys of the sequence that a tile of queries lies in, and the index of the
            tile within it; three fields are padding, so that a tile takes 32 bytes.
        page_table: int32 `[B, max_pages]` of a paged view; page_table_stride: its row stride.
    """

    q_offsets: Any = None
    kv_lens: Any = None
    kv_lens_stride: Any = None
    q_tiles: Any = None
    page_table: Any = None
    page_table_stride: Any = None


@gluon.jit
def seqlens_of_tile(varlen, b, tile, q_len, k_len, q_offset):
    """The sequence of a tile: (first query, first key, q_len, k_len, q_offset, tile within it)."""
    q_start = 0
    k_start = 0
    if varlen.q_tiles is not None:
        fields = varlen.q_tiles + 8 * tile
        q_start = gl.load(fields)
        q_len = gl.load(fields + 1)
        k_start = gl.load(fields + 2)
        k_len = gl.load(fields + 3)
        tile = gl.load(fields + 4)
        q_offset = k_len - q_len
    if varlen.q_offsets is not None:
        q_offset = gl.load(varlen.q_offsets + b).to(gl.int32)
    if varlen.kv_lens is not None:
        k_len = gl.minimum(k_len, gl.load(varlen.kv_lens + b * varlen.kv_lens_stride).to(gl.int32))
    return q_start, k_start, q_len, k_len, q_offset, tile


@gluon.jit
def zero_v_tail(v_smem, v_state, v_full, v_zeroed, zeroed_phases, valid, CONSUMER: gl.constexpr):
    """Zeros for all values but the first `valid` of the stage that is read next.

    Consumer 0 writes them; the others wait for `v_zeroed`, an mbarrier of each stage.  Only some
    tiles have such a tail, so phases are counted: bit s of `zeroed_phases` is that of stage s.
    """
    BLOCK_N: gl.constexpr = v_smem.shape[3]
    D: gl.constexpr = v_smem.shape[4]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    if valid < BLOCK_N:
        stage, phase = v_state
        if CONSUMER == 0:
            mbarrier.wait(v_full.index(stage), phase)
            v_tile = v_smem.index(stage).reshape([BLOCK_N, D])
            row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))[:, None]
            v = v_tile.load(LAYOUT)
            v_tile.store(gl.where(row < valid, v, gl.zeros_like(v)))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(v_zeroed.index(stage))
        else:
            mbarrier.wait(v_zeroed.index(stage), (zeroed_phases >> stage) & 1)
        zeroed_phases ^= 1 << stage
    return zeroed_phases


def varlen_q_tiles(problem: Problem, block_m: int) -> Tensor:
    """`VarlenInfo.q_tiles` for tiles of `block_m` queries, those that read most keys last.

    Made once for all layers of a model; a CUDA graph makes it anew in every replay.
    """
    assert problem.cu_q is not None and problem.cu_k is not None
    cu_q, cu_k, device = problem.cu_q, problem.cu_k, problem.q.device
    if capturing(device) or cu_q.is_inference() or cu_k.is_inference():
        return _q_tiles(cu_q, cu_k, problem, block_m)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = (numbers(cu_q), numbers(cu_k), block_m, problem.mask, device, stream)
    if key not in _TABLES:
        while len(_TABLES) >= MAX_TABLES:
            del _TABLES[next(iter(_TABLES))]
        _TABLES[key] = _q_tiles(cu_q, cu_k, problem, block_m)
    return _TABLES[key]


_TABLES: dict[Any, Tensor] = {}


def _q_tiles(cu_q: Tensor, cu_k: Tensor, problem: Problem, block_m: int) -> Tensor:
    """The host launches an upper bound of the number of tiles; surplus tiles have no queries."""
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    tiles = cdiv(problem.q.shape[2], block_m) + len(cu_q) - 1
    tiles_of_each = (cu_q.diff() + block_m - 1).div(block_m, rounding_mode="floor")
    last = tiles_of_each.cumsum(0, dtype=torch.int32)
    index = torch.arange(tiles, device=cu_q.device, dtype=torch.int32)
    sequence = torch.searchsorted(last, index, right=True)
    used = sequence < len(last)
    at = sequence.clamp(max=len(last) - 1)
    q_len, k_len = (torch.where(used, cu.diff()[at], 0) for cu in (cu_q, cu_k))
    tile = torch.where(used, index - torch.nn.functional.pad(last, (1, 0))[at], 0)
    row = tile * block_m
    stop = k_len
    if problem.mask.causal:
        stop = torch.minimum(k_len, k_len - q_len + torch.minimum(row + block_m, q_len))
    first = torch.zeros_like(stop)
    if problem.mask.window is not None:
        first = (k_len - q_len + row - problem.mask.window + 1).clamp(min=0)
    order = torch.argsort(torch.where(used, stop - first, -1))
    fields = (cu_q[at], q_len, cu_k[at], k_len, tile, tile, tile, tile)
    return torch.stack(fields, 1)[order].contiguous()
