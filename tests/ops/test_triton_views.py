"""Triton's kernels over rings, pages, ragged, quantized and growing views.

As test_triton.py: on a GPU, or in the interpreter that it starts.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import (
    DenseKV,
    GrowingKV,
    Mask,
    PagedKV,
    QuantizedKV,
    RaggedKV,
    Span,
)
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend, make_call
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.support.cases import on
from tests.support.views import in_spans

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too


@runs_kernels
@pytest.mark.parametrize("mask", [Mask(), Mask(window=9, sinks=2)], ids=str)
@pytest.mark.parametrize("queries", [1, 5, 30])
def test_ring(mask, queries):
    k, v = torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    q = torch.randn(2, 4, queries, 16)
    spans = (Span(0, 0, 2), Span(12, 2, 20), Span(4, 22, 8))
    ring = in_spans(k, v, spans, 40)
    truth = attend(make_call(q, DenseKV(k, v), mask=mask), backend="reference")
    q2, *stored = on(DEVICE, q, ring.k, ring.v)
    ours = attend(make_call(q2, DenseKV(*stored, spans), mask=mask), backend="triton")
    assert torch.allclose(ours.out.cpu(), truth.out, atol=1e-5)
    assert torch.allclose(ours.lse.cpu(), truth.lse, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("page", [1, 6, 16])
@pytest.mark.parametrize("queries", [1, 20])
def test_pages(page, queries):
    kv_lens = torch.tensor([30, 21], dtype=torch.int32)
    k, v, q = torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 4, queries, 16)
    count = -(-30 // page)
    table = torch.randperm(2 * count).view(2, count).to(torch.int32)
    pools = [torch.full((2 * count, 2, page, 16), torch.nan) for _ in range(2)]
    for row, length in enumerate(kv_lens.tolist()):
        for p in range(length):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[row, p // page], :, p % page] = x[row, :, p]
    for mask in (Mask(), Mask(window=9, sinks=2)):
        q2, *parts = on(DEVICE, q, *pools, table, kv_lens)
        ours = attend(make_call(q2, PagedKV(*parts, 30), mask=mask), backend="triton")
        for row, length in enumerate(kv_lens.tolist()):
            alone = DenseKV(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
            truth = attend(make_call(q[row : row + 1], alone, mask=mask), backend="reference")
            assert torch.allclose(ours.out[row : row + 1].cpu(), truth.out, atol=1e-5)


@runs_kernels
def test_ragged():
    kv_lens = torch.tensor([[25, 9], [33, 3]], dtype=torch.int32)
    pool_k, pool_v = torch.randn(20, 8, 16), torch.randn(20, 8, 16)
    table = torch.randperm(20).view(2, 2, 5).to(torch.int32)
    positions = torch.full((20, 8), -1, dtype=torch.int32)
    for b in range(2):
        for h in range(2):
            kept = torch.randperm(40)[: int(kv_lens[b, h])].sort().values.to(torch.int32)
            for slot, p in enumerate(kept.tolist()):
                positions[table[b, h, slot // 8], slot % 8] = p
    pool_k[positions < 0], pool_v[positions < 0] = torch.nan, torch.nan
    q = torch.randn(2, 4, 3, 16)
    for mask in (Mask(), Mask(window=12)):
        parts = (pool_k, pool_v, positions, table, kv_lens)
        truth = attend(make_call(q, RaggedKV(*parts, 40, 33), mask=mask), backend="reference")
        q2, *moved = on(DEVICE, q, *parts)
        ours = attend(make_call(q2, RaggedKV(*moved, 40, 33), mask=mask), backend="triton")
        assert torch.allclose(ours.out.cpu(), truth.out, atol=1e-5)
        assert torch.allclose(ours.lse.cpu(), truth.lse, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize(
    ("bits", "fp8", "queries", "dim", "v_group"),
    [
        (*stored, queries, *sizes)
        for at, stored in enumerate([(4, False), (8, False), (8, True)])
        for queries in (1, 21 if DEVICE == "cuda" else 5)
        for turn, sizes in enumerate([(32, 32), (64, 16)])
        if DEVICE == "cuda" or turn == (at + queries) % 2  # interpreted: each pair of values once
    ],
)
def test_quantized(bits, fp8, queries, dim, v_group):
    k, v, recent = torch.randn(2, 2, 64, dim), torch.randn(2, 2, 64, dim), torch.randn(2, 2, 9, dim)
    quantized = (
        quantize_keys(k, bits=bits, group=16, fp8=fp8),
        quantize_values(v, bits=bits, group=v_group, fp8=fp8),
    )
    q = torch.randn(2, 4, queries, dim)
    for dtype in (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.bfloat16):
        parts = (recent.to(dtype), (recent * 0.5).to(dtype))
        view = QuantizedKV(*quantized, *parts, bits, bits, 16)
        whole = dense(view)
        for mask in (Mask(), Mask(window=20, sinks=3)):
            truth = attend(
                make_call(
                    q.to(dtype).double(), DenseKV(whole.k.double(), whole.v.double()), mask=mask
                ),
                backend="reference",
            )
            qdata = [type(x)(*on(DEVICE, *x)) for x in quantized]
            q2, *moved = on(DEVICE, q.to(dtype), *parts)
            ours = attend(
                make_call(q2, QuantizedKV(*qdata, *moved, bits, bits, 16), mask=mask),
                backend="triton",
            )
            allowed = 1e-5 if dtype == torch.float32 else 3e-2
            assert (ours.out.cpu() - truth.out).abs().max() < allowed


@runs_kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("packed", "recent"), [(0, 5), (64, 1), (96, 33), (128, 48)])
def test_growing_views(bits, packed, recent):
    """Storage whose fill is a device tensor equals the filled part alone."""
    k, v, q = torch.randn(1, 2, 128, 32), torch.randn(1, 2, 128, 32), torch.randn(1, 4, 2, 32)
    parts = quantize_keys(k, bits=bits, group=32), quantize_values(v, bits=bits, group=32)
    for part in parts:  # values past the end must never matter
        part.scale[:, :, packed if part is parts[1] else packed // 32 :] = torch.nan
    recents = [torch.full((1, 2, 48, 32), torch.nan) for _ in range(2)]
    for x in recents:
        x[:, :, :recent] = torch.randn(1, 2, recent, 32)
    storage = QuantizedKV(*parts, *recents, bits, bits, 32)
    groups = packed // 32
    filled = QuantizedKV(
        QuantizedTensor(parts[0].qdata[:, :, :packed], *(x[:, :, :groups] for x in parts[0][1:])),
        QuantizedTensor(*(x[:, :, :packed] for x in parts[1])),
        *(x[:, :, :recent] for x in recents),
        bits,
        bits,
        32,
    )
    stop = torch.tensor([packed + recent])
    truth = attend(make_call(q, filled, mask=Mask()), backend="reference")
    for backend in ("tiled", "triton"):
        device = DEVICE if backend == "triton" else "cpu"
        view = GrowingKV(moved(storage, device), torch.tensor([packed], device=device))
        where = {"kv_lens": stop.to(device), "q_offset": (stop - 2).to(device)}
        ours = attend(make_call(q.to(device), view, mask=Mask(), **where), backend=backend)
        assert torch.allclose(ours.out.cpu(), truth.out, atol=2e-5)
        assert torch.allclose(ours.lse.cpu(), truth.lse, atol=2e-5)


def moved(view, device):
    """A quantized view on a device."""
    tensors = [QuantizedTensor(*(x.to(device) for x in part)) for part in (view.k, view.v)]
    recents = view.recent_k.to(device), view.recent_v.to(device)
    return QuantizedKV(*tensors, *recents, view.bits_k, view.bits_v, view.k_group)
