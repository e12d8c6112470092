"""Prefill over rings and codes piece by piece, and the kernels that pack and write out codes.

As test_triton.py: on a card, or in the interpreter that it starts.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import DenseKV, Mask, QuantizedKV, Span, formats
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend
from saccade.ops.attention.combine import Combiner
from saccade.ops.kv_write import quantize as pack
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.support.cases import nothing_matters, on

__all__ = ["pytestmark"]  # on a card these are GPU tests too

MASKS = [Mask(), Mask(causal=False), Mask(window=25, sinks=3), Mask(window=7)]
FORMATS = [(8, False), (4, False), (8, True)]


def coded(x, quantize, bits, group, fp8):
    found = quantize(x, bits=bits, group=group, fp8=fp8)
    return QuantizedTensor(*on(DEVICE, *found))


def options(extra, queries, keys):
    torch.manual_seed(3)
    if extra == "padding":
        real = torch.rand(2, keys) > 0.3
        real[:, -queries:] = True
        return {"key_padding": real}
    return {
        "plain": {},
        "foreign": {"attn_mask": torch.rand(2, 1, queries, keys) > 0.4},
        "sink": {"sink_logits": torch.randn(4)},
        "alibi": {"alibi_slopes": torch.rand(4)},
        "offsets": {"q_offset": torch.tensor([keys - queries, 30])},
        "lengths": {"kv_lens": torch.tensor([keys, 50])},
        "softcap": {"softcap": 3.0},
    }[extra]


EXTRAS = ["plain", "padding", "foreign", "sink", "alibi", "offsets", "lengths", "softcap"]


def compare(q, kv, moved, mask, more):
    whole = dense(kv)
    plain = DenseKV(whole.k.double(), whole.v.double())
    truth = attend(q.double(), plain, mask=mask, backend="reference", **more)
    ours = attend(on(DEVICE, q), moved, mask=mask, backend="triton", **on(DEVICE, more))
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
def test_codes_are_written_out_by_pieces(monkeypatch, mask, extra):
    from saccade.ops.attention.nvidia import chunked as triton_pieces

    monkeypatch.setattr(triton_pieces, "CHUNK_BYTES", 2 * 2 * 16 * 2 * 4 * 40)  # 32 keys
    k, v, recent = torch.randn(2, 2, 80, 16), torch.randn(2, 2, 80, 16), torch.randn(2, 2, 23, 16)
    keys = coded(k, quantize_keys, 8, 16, False)
    values = coded(v, quantize_values, 4, 16, False)
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
def test_spans_of_a_ring_are_pieces(mask, extra):
    k, v = torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)
    spans = (Span(0, 0, 3), Span(25, 3, 40), Span(8, 43, 17))
    ring = nothing_matters(k, v, spans, 70)
    moved = DenseKV(*on(DEVICE, *ring), spans)
    more = options(extra, 33, 60)
    compare(torch.randn(2, 4, 33, 16), DenseKV(*ring, spans), moved, mask, more)


@runs_kernels
def test_a_window_leaves_pieces_alone(monkeypatch):
    """Of a long history under a window only what it reaches is written out."""
    from saccade.ops.attention.nvidia import chunked as triton_pieces

    monkeypatch.setattr(triton_pieces, "CHUNK_BYTES", 2 * 16 * 2 * 4 * 16)  # 16 keys
    written = []
    original = triton_pieces.write_out
    monkeypatch.setattr(
        triton_pieces, "write_out", lambda kv, *cut: written.append(cut) or original(kv, *cut)
    )
    x = torch.randn(1, 2, 160, 16)
    qdata = (coded(x, q, 8, 16, False) for q in (quantize_keys, quantize_values))
    recent = on(DEVICE, torch.randn(1, 2, 20, 16))
    kv = QuantizedKV(*qdata, recent, recent, 8, 8, 16)
    attend(on(DEVICE, torch.randn(1, 2, 20, 16)), kv, mask=Mask(window=30, sinks=2),
           backend="triton")  # fmt: skip
    assert [cut[0] for cut in written] == [0, 128, 144]


@runs_kernels
@pytest.mark.parametrize(("splits", "dim"), [(2, 48), (17, 128), (33, 64), (70, 16), (300, 128)])
def test_splits_are_joined(splits, dim):
    """One program may hold all splits of a row or take them in turn; some saw nothing."""
    from saccade.ops.attention.nvidia.triton.split_kv import Parts

    x = torch.empty(2, 3, 2, dim, device=DEVICE)
    parts = Parts(SimpleNamespace(q=x, v=x), splits)
    torch.manual_seed(0)
    out, lse = torch.randn(parts.out.shape), torch.randn(parts.lse.shape) * 3
    lse[1], lse[:, 1, 2, 0] = -torch.inf, -torch.inf
    out[lse == -torch.inf] = 0
    parts.out.copy_(out)
    parts.lse.copy_(lse)
    found = parts.joined(torch.float32)
    total = lse.double().logsumexp(0)
    weights = (lse.double() - total).exp().nan_to_num(0)
    assert torch.allclose(found.lse.cpu().double(), total, atol=1e-5)
    truth = (weights[..., None] * out.double()).sum(0)
    assert torch.allclose(found.out.cpu().double(), truth, atol=1e-5)


def places(shape, bits, fp8, rows, groups):
    """Storage larger than what is packed, so that strides matter."""
    batch, heads, length, dim = shape
    kind = formats.FP8 if fp8 else torch.uint8
    qdata = torch.zeros(batch, heads, length + 5, dim * bits // 8, dtype=torch.uint8, device=DEVICE)
    parts = (torch.zeros(batch, heads, rows + 3, groups, device=DEVICE).half() for _ in range(2))
    return QuantizedTensor(
        qdata.view(kind)[:, :, 2 : 2 + length], *(x[:, :, 1 : 1 + rows] for x in parts)
    )


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "fp8"), FORMATS)
@pytest.mark.parametrize(("dim", "group"), [(16, 8), (24, 6), (64, 64), (80, 32)])
def test_packing_is_the_definition(bits, fp8, dim, group, dtype):
    x = torch.randn(2, 3, 4 * group, dim).to(dtype)
    x[0, 0, :group] = 0.25  # a group without any range
    v_group = dim if dim % group else group
    for pack_it, quantize, rows, groups, of in (
        (pack.pack_keys, quantize_keys, 4, dim, group),
        (pack.pack_values, quantize_values, 4 * group, dim // v_group, v_group),
    ):
        into = places(x.shape, bits, fp8, rows, groups)
        pack_it(on(DEVICE, x), into, bits=bits, group=of)
        truth = quantize(x, bits=bits, group=of, fp8=fp8)
        for part, expected in zip(into[1:], truth[1:], strict=True):
            assert torch.equal(part.cpu(), expected)
        assert torch.equal(into.qdata.cpu().view(torch.uint8), truth.qdata.view(torch.uint8))


@runs_kernels
@pytest.mark.parametrize(("bits", "fp8"), FORMATS)
def test_writing_out_is_the_definition(bits, fp8):
    k, v = torch.randn(2, 2, 64, 48), torch.randn(2, 2, 64, 48)
    keys, values = coded(k, quantize_keys, bits, 16, fp8), coded(v, quantize_values, bits, 24, fp8)
    nothing = torch.empty(2, 2, 0, 48, device=DEVICE)
    kv = QuantizedKV(keys, values, nothing, nothing, bits, bits, 16)
    found = pack.write_out(kv, 16, 48)
    tile = next(iter(kv.tiles(((16, 48),), 32)))
    for ours, truth in zip(found, (tile.k, tile.v), strict=True):
        assert torch.allclose(ours, truth, atol=1e-6)


def test_parts_join_into_the_whole():
    q, k, v = (torch.randn(1, h, n, 8).double() for h, n in ((4, 6), (2, 20), (2, 20)))
    call = {"mask": Mask(causal=False), "backend": "reference"}
    truth = attend(q, DenseKV(k, v), **call)
    joined = Combiner((1, 4, 6, 8), q)
    for part in (slice(0, 7), slice(7, 7), slice(7, 20)):
        joined.add(attend(q, DenseKV(k[:, :, part], v[:, :, part]), **call), 0, 6)
    found = joined.result()
    assert torch.allclose(found.out, truth.out, atol=1e-6)
    assert torch.allclose(found.lse, truth.lse.float(), atol=1e-6)
