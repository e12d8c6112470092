"""Rows of different lengths in the Gluon kernel: packed documents, ends of rows, pages of a pool.

Keys that lie past the end of a row arrive all the same: the next document's, or whatever an
unfinished page holds.  Their scores are hidden like those of any unseen key, and their values are
overwritten with zeros (`clear_tail`), since a weight of 0 times NaN is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from saccade.core.host_memo import capturing
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.varlen import numbers
from saccade.ops.gpu.intmath import cdiv

REMEMBERED = 16  # tables of documents, 32 bytes a tile each
FIELDS = 8  # numbers of a tile of packed queries, of which five are used: 32 bytes, read at once


class RowExtents(NamedTuple):
    """Where rows begin and end; every field may be None.

    Attributes:
        offsets: int64 `[B]`, position of each row's first query.
        kv_lens: int32 or int64 `[B]`, keys of each row; kv_lens_row: its stride.
        documents: int32 `[tiles, 8]`: first query, queries, first key and keys of the document
            that a tile of queries lies in, and which of its tiles it is; shortest first.
        pages: int32 `[B, max_pages]`, the table of a paged view; pages_row: its stride.
    """

    offsets: Any = None
    kv_lens: Any = None
    kv_lens_row: Any = None
    documents: Any = None
    pages: Any = None
    pages_row: Any = None


@gluon.jit
def rows_of_tile(row_extents, b, tile, q_len, k_len, q_offset):
    """The row of a tile: (first query, first key, q_len, k_len, offset, tile in the row)."""
    q_first = 0
    k_first = 0
    if row_extents.documents is not None:
        at = row_extents.documents + 8 * tile
        q_first = gl.load(at)
        q_len = gl.load(at + 1)
        k_first = gl.load(at + 2)
        k_len = gl.load(at + 3)
        tile = gl.load(at + 4)
        q_offset = k_len - q_len
    if row_extents.offsets is not None:
        q_offset = gl.load(row_extents.offsets + b).to(gl.int32)
    if row_extents.kv_lens is not None:
        k_len = gl.minimum(
            k_len, gl.load(row_extents.kv_lens + b * row_extents.kv_lens_row).to(gl.int32)
        )
    return q_first, k_first, q_len, k_len, q_offset, tile


@gluon.jit
def clear_tail(v_mem, v_at, v_full, cleared, done, real, WHO: gl.constexpr):
    """Zeros for values past the first `real` of the stage that is read next.

    The first consumer writes them; the others wait for `cleared`, a barrier of each stage.  Bit s
    of `done` is the phase of the barrier of stage s: there are tails in some tiles only.
    """
    N: gl.constexpr = v_mem.shape[3]
    D: gl.constexpr = v_mem.shape[4]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    if real < N:
        stage, phase = v_at
        if WHO == 0:
            mbarrier.wait(v_full.index(stage), phase)
            values = v_mem.index(stage).reshape([N, D])
            row = gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))[:, None]
            held = values.load(LAYOUT)
            values.store(gl.where(row < real, held, gl.zeros_like(held)))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(cleared.index(stage))
        else:
            mbarrier.wait(cleared.index(stage), (done >> stage) & 1)
        done ^= 1 << stage
    return done


def documents_of(problem: Problem, block: int) -> Tensor:
    """`Extents.documents`: tiles of `block` queries, those with most keys to visit last.

    Made once for all layers of a model; a CUDA graph makes it anew every time it runs.
    """
    assert problem.cu_q is not None and problem.cu_k is not None
    cu_q, cu_k, device = problem.cu_q, problem.cu_k, problem.q.device
    if capturing(device) or cu_q.is_inference() or cu_k.is_inference():
        return _documents(cu_q, cu_k, problem, block)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = (numbers(cu_q), numbers(cu_k), block, problem.causal, problem.window, device, stream)
    if key not in _MADE:
        while len(_MADE) >= REMEMBERED:
            del _MADE[next(iter(_MADE))]
        _MADE[key] = _documents(cu_q, cu_k, problem, block)
    return _MADE[key]


_MADE: dict[Any, Tensor] = {}


def _documents(cu_q: Tensor, cu_k: Tensor, problem: Problem, block: int) -> Tensor:
    """How many tiles there are is an upper bound known on the host; those too many have no rows."""
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    tiles = cdiv(problem.q.shape[2], block) + len(cu_q) - 1
    last = (cu_q.diff() + block - 1).div(block, rounding_mode="floor").cumsum(0, dtype=torch.int32)
    index = torch.arange(tiles, device=cu_q.device, dtype=torch.int32)
    document = torch.searchsorted(last, index, right=True)
    known = document < len(last)
    at = document.clamp(max=len(last) - 1)
    q_len, k_len = (torch.where(known, cu.diff()[at], 0) for cu in (cu_q, cu_k))
    tile = torch.where(known, index - torch.nn.functional.pad(last, (1, 0))[at], 0)
    row = tile * block
    stop = k_len
    if problem.causal:
        stop = torch.minimum(k_len, k_len - q_len + torch.minimum(row + block, q_len))
    first = torch.zeros_like(stop)
    if problem.window is not None:
        first = (k_len - q_len + row - problem.window + 1).clamp(min=0)
    order = torch.argsort(torch.where(known, stop - first, -1))
    fields = (cu_q[at], q_len, cu_k[at], k_len, tile, tile, tile, tile)
    return torch.stack(fields, 1)[order].contiguous()
