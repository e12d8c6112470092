"""Packed sequences (cu_seqlens): running a backend on one after the other.

Queries attend only to keys of their own sequence, and positions restart at every sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from saccade.core import AttentionOutput, DenseKV, PerHeadFP8KV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.checks import numbers


def per_sequence(
    call: AttentionCall, run: Callable[[AttentionCall], AttentionOutput]
) -> AttentionOutput:
    """`run` on every sequence of a packed call (batch 1), concatenated along the length.

    For backends without kernels of their own for `cu_seqlens`.
    """
    assert call.cu_seqlens is not None and isinstance(call.kv, DenseKV | PerHeadFP8KV)
    q_bounds, k_bounds = (numbers(bounds) for bounds in call.cu_seqlens)
    assert q_bounds is not None and k_bounds is not None
    parts = []
    for i in range(len(q_bounds) - 1):
        q_len, k_len = q_bounds[i + 1] - q_bounds[i], k_bounds[i + 1] - k_bounds[i]
        kv = _part(call.kv, k_bounds[i], k_len)
        q = call.q.narrow(2, q_bounds[i], q_len)
        parts.append(run(call.with_(q=q, kv=kv, q_offset=k_len - q_len, cu_seqlens=None)))
    return AttentionOutput.joined(parts)


def _part(kv: DenseKV | PerHeadFP8KV, first: int, length: int) -> DenseKV | PerHeadFP8KV:
    """Keys first .. first + length - 1 of a view, as a view."""
    if isinstance(kv, PerHeadFP8KV):
        return replace(kv, qdata=_part(kv.qdata, first, length))
    return DenseKV(kv.k.narrow(2, first, length), kv.v.narrow(2, first, length))
