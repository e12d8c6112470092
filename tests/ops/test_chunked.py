"""Prefill over rings and quantized keys in KV chunks, and the combination of partial results.

As test_triton.py: on a GPU, or in the interpreter that it starts.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import DenseKV, Mask, QuantizedKV, Span
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend, make_call
from saccade.ops.attention.combine import Combiner
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.support.cases import on
from tests.support.views import in_spans

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too

MASKS = [Mask(), Mask(causal=False), Mask(window=25, sinks=3), Mask(window=7)]


def stored(x, quantize, bits, group):
    found = quantize(x, bits=bits, group=group)
    return QuantizedTensor(*on(DEVICE, *found))


def options(extra, queries, keys):
    torch.manual_seed(3)
    if extra == "padding":
        real = torch.rand(2, keys) > 0.3
        real[:, -queries:] = True
        return {"key_padding": real}
    return {
        "plain": {},
        "attn_mask": {"attn_mask": torch.rand(2, 1, queries, keys) > 0.4},
        "sink": {"sink_logits": torch.randn(4)},
        "alibi": {"alibi_slopes": torch.rand(4)},
        "offsets": {"q_offset": torch.tensor([keys - queries, 30])},
        "lengths": {"kv_lens": torch.tensor([keys, 50])},
        "softcap": {"softcap": 3.0},
    }[extra]


EXTRAS = ["plain", "padding", "attn_mask", "sink", "alibi", "offsets", "lengths", "softcap"]


def compare(q, kv, moved, mask, more):
    whole = dense(kv)
    plain = DenseKV(whole.k.double(), whole.v.double())
    truth = attend(make_call(q.double(), plain, mask=mask, **more), backend="reference")
    ours = attend(make_call(on(DEVICE, q), moved, mask=mask, **on(DEVICE, more)), backend="triton")
    assert not ours.out.isnan().any()
    assert (ours.out.cpu() - truth.out).abs().max() < 1e-5
    assert torch.equal(ours.lse.cpu().isneginf(), truth.lse.isneginf())
    lse, expected = (x.nan_to_num(neginf=0) for x in (ours.lse.cpu(), truth.lse))
    assert (lse - expected).abs().max() < 1e-4


def pairs(masks):
    """Every mask with every extra; a third of them in the slow interpreter."""
    return [(mask, extra) for extra in EXTRAS for mask in masks][:: 1 if DEVICE == "cuda" else 3]


@runs_kernels
@pytest.mark.parametrize(("mask", "extra"), pairs(MASKS), ids=str)
def test_quantized_keys_are_dequantized_in_chunks(monkeypatch, mask, extra):
    from saccade.ops.attention.nvidia import chunked

    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2 * 2 * 16 * 2 * 4 * 40)  # 32 keys
    k, v, recent = torch.randn(2, 2, 80, 16), torch.randn(2, 2, 80, 16), torch.randn(2, 2, 23, 16)
    keys = stored(k, quantize_keys, 8, 16)
    values = stored(v, quantize_values, 4, 16)
    there = QuantizedKV(keys, values, *on(DEVICE, recent, recent / 2), 8, 4, 16)
    here = QuantizedKV(
        QuantizedTensor(*on("cpu", *keys)),
        QuantizedTensor(*on("cpu", *values)),
        recent,
        recent / 2,
        8,
        4,
        16,
    )
    compare(torch.randn(2, 4, 21, 16), here, there, mask, options(extra, 21, 103))


@runs_kernels
@pytest.mark.parametrize(("mask", "extra"), pairs(MASKS[2:]), ids=str)
def test_spans_of_a_ring_are_chunks(mask, extra):
    k, v = torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)
    spans = (Span(0, 0, 3), Span(25, 3, 40), Span(8, 43, 17))
    ring = in_spans(k, v, spans, 70)
    moved = DenseKV(*on(DEVICE, ring.k, ring.v), spans)
    more = options(extra, 33, 60)
    compare(torch.randn(2, 4, 33, 16), ring, moved, mask, more)


@runs_kernels
def test_chunks_outside_a_window_are_not_dequantized(monkeypatch):
    """Of a long history only the chunks that a window reaches are dequantized."""
    from saccade.ops.attention.nvidia import chunked

    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2 * 16 * 2 * 4 * 16)  # 16 keys
    ranges = []
    original = chunked.dequantize_range
    monkeypatch.setattr(
        chunked, "dequantize_range", lambda kv, *cut: ranges.append(cut) or original(kv, *cut)
    )
    x = torch.randn(1, 2, 160, 16)
    qdata = (stored(x, q, 8, 16) for q in (quantize_keys, quantize_values))
    recent = on(DEVICE, torch.randn(1, 2, 20, 16))
    kv = QuantizedKV(*qdata, recent, recent, 8, 8, 16)
    attend(
        make_call(on(DEVICE, torch.randn(1, 2, 20, 16)), kv, mask=Mask(window=30, sinks=2)),
        backend="triton",
    )
    assert [cut[0] for cut in ranges] == [0, 128, 144]


@runs_kernels
@pytest.mark.parametrize(("splits", "dim"), [(2, 48), (17, 128), (33, 64), (70, 16), (300, 128)])
def test_combining_splits(splits, dim):
    """A program combines all splits at once or in a loop; in some splits every key is masked."""
    from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials

    x = torch.empty(2, 3, 2, dim, device=DEVICE)
    partials = SplitKVPartials(SimpleNamespace(q=x, v=x), splits)
    torch.manual_seed(0)
    out, lse = torch.randn(partials.out.shape), torch.randn(partials.lse.shape) * 3
    lse[1], lse[:, 1, 2, 0] = -torch.inf, -torch.inf
    out[lse == -torch.inf] = 0
    partials.out.copy_(out)
    partials.lse.copy_(lse)
    found = partials.combine(torch.float32)
    total = lse.double().logsumexp(0)
    weights = (lse.double() - total).exp().nan_to_num(0)
    assert torch.allclose(found.lse.cpu().double(), total, atol=1e-5)
    truth = (weights[..., None] * out.double()).sum(0)
    assert torch.allclose(found.out.cpu().double(), truth, atol=1e-5)


def test_combining_parts_of_the_keys():
    q, k, v = (torch.randn(1, h, n, 8).double() for h, n in ((4, 6), (2, 20), (2, 20)))
    mask = Mask(causal=False)
    truth = attend(make_call(q, DenseKV(k, v), mask=mask), backend="reference")
    combiner = Combiner((1, 4, 6, 8), q)
    for part in (slice(0, 7), slice(7, 7), slice(7, 20)):
        call = make_call(q, DenseKV(k[:, :, part], v[:, :, part]), mask=mask)
        combiner.add(attend(call, backend="reference"), 0, 6)
    found = combiner.result()
    assert torch.allclose(found.out, truth.out, atol=1e-6)
    assert torch.allclose(found.lse, truth.lse.float(), atol=1e-6)
