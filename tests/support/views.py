"""Keys and values laid out as each view stores them; what lies outside of it is NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.core import DenseKV, GrowingKV, PagedKV, QuantizedKV, RaggedKV, Span
from saccade.core.formats import quantize_keys, quantize_values
from tests.support.random_inputs import nan


def in_spans(k: Tensor, v: Tensor, spans: tuple[Span, ...], slots: int) -> DenseKV:
    """A ring of `slots` slots whose spans hold positions of `k` and `v`."""
    stored = []
    for x in (k, v):
        ring = x.new_full((*x.shape[:2], slots, x.shape[3]), torch.nan)
        for slot, position, length in spans:
            ring[:, :, slot : slot + length] = x[:, :, position : position + length]
        stored.append(ring)
    return DenseKV(stored[0], stored[1], spans)


def ring(k: Tensor, v: Tensor, sinks: int = 2, newer: int = 8) -> DenseKV:
    """All keys in a ring: sinks in front, then the newer run before the older one."""
    older = k.shape[2] - sinks - newer
    spans = (
        Span(0, 0, sinks),
        Span(sinks + newer + 4, sinks, older),
        Span(sinks + 2, sinks + older, newer),
    )
    return in_spans(k, v, spans, k.shape[2] + 10)


def paged(k: Tensor, v: Tensor, page: int, kv_lens: Sequence[int] | None = None) -> PagedKV:
    """Pages in random order; row b holds its first kv_lens[b] keys (default all)."""
    batch, heads, length, _ = k.shape
    ends = [length] * batch if kv_lens is None else list(kv_lens)
    pages = -(-length // page)
    table = torch.randperm(batch * pages).view(batch, pages).to(torch.int32)
    pools = [x.new_full((batch * pages, heads, page, x.shape[3]), torch.nan) for x in (k, v)]
    for row, end in enumerate(ends):
        for position in range(end):
            at = int(table[row, position // page]), slice(None), position % page
            for pool, x in zip(pools, (k, v), strict=True):
                pool[at] = x[row, :, position]
    lens = torch.tensor(ends, dtype=torch.int32, device=k.device)
    return PagedKV(pools[0], pools[1], table.to(k.device), lens, max(ends))


def ragged(k: Tensor, v: Tensor, kept: Tensor, page: int = 8) -> RaggedKV:
    """Pages of their own for every row and head, which holds the positions `kept` `[B, Hkv, L]`."""
    batch, heads, length, _ = k.shape
    pages = -(-length // page)
    table = torch.randperm(batch * heads * pages).view(batch, heads, pages).to(torch.int32)
    pools = [nan(batch * heads * pages, page, x.shape[3]).to(x.dtype) for x in (k, v)]
    positions = torch.full((batch * heads * pages, page), -1, dtype=torch.int32)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for slot, position in enumerate(kept[b, h].nonzero().flatten().tolist()):
            at = int(table[b, h, slot // page]), slot % page
            pools[0][at], pools[1][at] = k[b, h, position], v[b, h, position]
            positions[at] = position
    kv_lens = kept.sum(-1).to(torch.int32)
    return RaggedKV(
        pools[0], pools[1], positions, table, kv_lens, end=length, max_length=int(kv_lens.max())
    )


def quantized(
    k: Tensor,
    v: Tensor,
    recent: int,
    *,
    bits: int = 8,
    group: int = 64,
    v_group: int | None = None,
    fp8: bool = False,
) -> QuantizedKV:
    """All keys but the `recent` newest quantized; their number is a multiple of `group`."""
    old = k.shape[2] - recent
    return QuantizedKV(
        quantize_keys(k[:, :, :old], bits=bits, group=group, fp8=fp8),
        quantize_values(v[:, :, :old], bits=bits, group=v_group or v.shape[3], fp8=fp8),
        k[:, :, old:],
        v[:, :, old:],
        bits,
        bits,
        group,
    )


def growing(view: QuantizedKV) -> GrowingKV:
    """A quantized view whose length is a device tensor; all of it is filled."""
    return GrowingKV(view, torch.tensor([view.k.qdata.shape[2]]))
