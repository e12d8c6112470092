"""Sequences packed into one row: where they begin, or which pairs of a row are of one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.core.host_memo import HostMemo


def packed_seqlens(
    query: Tensor, kv_len: int, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens of sequences packed into one row, or None for one sequence.

    Some models (gpt-oss among them) do not pass position_ids to transformers' mask code, so packed
    sequences would attend to each other.  A position that does not increase begins a new sequence.
    """
    if not _may_be_packed(query, kv_len):
        return None
    edges, positions = _edges(kwargs), _positions(query, kwargs)
    if edges is not None or positions is None:
        return edges
    cu_seqlens = _restarts(positions)
    return None if cu_seqlens is None else (cu_seqlens, cu_seqlens)


def _may_be_packed(query: Tensor, kv_len: int) -> bool:
    return query.shape[0] == 1 and query.shape[2] == kv_len and kv_len > 1


def _edges(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cumulative lengths of queries and keys, where the caller gave them."""
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if not isinstance(queries, Tensor):
        return None
    return queries, keys if isinstance(keys, Tensor) else queries


def _positions(query: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Positions `[1, Lq]` of a call without a cache."""
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or kwargs.get("use_cache"):
        return None
    return positions if positions.shape == (1, query.shape[2]) else None


def _read_restarts(positions: Tensor) -> Tensor | None:
    """cu_seqlens of positions `[1, Lq]` that start anew, None if none do."""
    starts = (positions[0].diff() <= 0).nonzero().flatten() + 1
    if starts.numel() == 0:
        return None
    edge = starts.new_tensor([0]), starts.new_tensor([positions.shape[1]])
    return torch.cat((edge[0], starts, edge[1]))


_restarts = HostMemo(_read_restarts)  # once for all layers


def same_sequence(query: Tensor, kv_len: int, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The same as a mask, bool `[1, 1, Lq, Lq]`, made without reading a value; None without them.

    For graphs that are being traced: the number of sequences differs from call to call.
    """
    if not _may_be_packed(query, kv_len):
        return None
    edges, positions = _edges(kwargs), _positions(query, kwargs)
    if edges is not None:
        slots = torch.arange(kv_len, device=query.device)
        queries, keys = (torch.bucketize(slots, edge[1:], right=True) for edge in edges)
    elif positions is not None:
        begins = positions[0].diff(prepend=positions[0, :1] - 1) <= 0
        queries = keys = begins.cumsum(0)
    else:
        return None
    return (queries[:, None] == keys)[None, None]
