"""Packed documents: run a backend document by document and join the results.

For backends without kernels of their own for `cu_seqlens`.  Documents are disjoint, so attention
inside each is the whole answer; positions restart at every document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from saccade.core import AttentionOutput, DenseKV, ScaledKV
from saccade.ops.call import AttentionCall


def per_document(
    call: AttentionCall, run: Callable[[AttentionCall], AttentionOutput]
) -> AttentionOutput:
    """`run` on every document of a packed call (batch 1), joined along the length."""
    assert call.cu_seqlens is not None and isinstance(call.kv, DenseKV | ScaledKV)
    q_bounds, k_bounds = (bounds.tolist() for bounds in call.cu_seqlens)
    parts = []
    for i in range(len(q_bounds) - 1):
        q_len, k_len = q_bounds[i + 1] - q_bounds[i], k_bounds[i + 1] - k_bounds[i]
        kv = _part(call.kv, k_bounds[i], k_len)
        q = call.q.narrow(2, q_bounds[i], q_len)
        parts.append(run(call.with_(q=q, kv=kv, q_offset=k_len - q_len, cu_seqlens=None)))
    return AttentionOutput(
        torch.cat([part.out for part in parts], dim=2),
        torch.cat([part.lse for part in parts], dim=2),
    )


def _part(kv: DenseKV | ScaledKV, first: int, length: int) -> DenseKV | ScaledKV:
    """Keys first .. first + length - 1 of a view, as a view."""
    if isinstance(kv, ScaledKV):
        return replace(kv, codes=_part(kv.codes, first, length))
    return DenseKV(kv.k.narrow(2, first, length), kv.v.narrow(2, first, length))
