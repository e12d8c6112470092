"""fp8 queries, keys and values: their definition, the backends that take them, and refusals."""

import pytest
import torch

import saccade
from saccade.core import DenseKV, PerHeadFP8, PerHeadFP8KV, Span, Unsupported, quantize_fp8_per_head
from saccade.core.formats import FP8
from saccade.ops import attend, make_call
from saccade.ops.attention.dispatch import BACKENDS
from tests.support.cases import EXTRAS, MASKS, Case
from tests.support.random_inputs import qkv

SERVING = ["reference", "tiled"]
NAN = 0x7F  # as a code
OTHERS = [name for name in BACKENDS if name not in SERVING]


def fp8_qkv():
    return [quantize_fp8_per_head(x) for x in qkv()]


def numbers(x):
    """The dequantized values in float64: the definition."""
    return x.qdata.double() * x.scale.double()[..., None, None]


class TestQuantizeHeads:
    def test_one_scale_for_every_row_and_head(self):
        x = torch.randn(2, 3, 50, 16) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
        quantized = quantize_fp8_per_head(x)
        assert quantized.qdata.dtype == FP8 and quantized.scale.shape == (2, 3)
        assert (quantized.qdata.float().abs().amax((2, 3)) == 448).all()
        assert torch.allclose(
            quantized.dequantize(), x, rtol=1 / 16, atol=x.abs().amax().item() * 2**-18
        )

    def test_zeros_stay_zeros_and_half_precision_is_taken(self):
        assert (quantize_fp8_per_head(torch.zeros(1, 1, 4, 16)).dequantize() == 0).all()
        x = torch.randn(1, 1, 4, 16).bfloat16()
        assert torch.equal(
            quantize_fp8_per_head(x).qdata.float(), quantize_fp8_per_head(x.float()).qdata.float()
        )

    def test_refuses_in_a_sentence(self):
        qdata = torch.zeros(1, 2, 4, 16).to(FP8)
        with pytest.raises(
            ValueError, match="must be float8_e4m3fn .*Use saccade.quantize_fp8_per_head"
        ):
            PerHeadFP8(qdata.float(), torch.ones(1, 2))
        with pytest.raises(ValueError, match=r"scale .* must be float32 \[1, 2\], got .*\[2\]"):
            PerHeadFP8(qdata, torch.ones(2))


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_is_attention_over_what_the_codes_stand_for(mask, extra, backend):
    q, k, v, options = Case((6, 2), (40, 50), mask, extra).inputs()
    q, k, v = (quantize_fp8_per_head(x.nan_to_num()) for x in (q, k, v))
    hidden = options.get("key_padding")
    if hidden is not None:  # padding holds fp8 NaNs, which must never matter
        for x in (k, v):
            x.qdata.view(torch.uint8).masked_fill_(~hidden[:, None, :, None], NAN)
    wide = [numbers(x) for x in (q, k, v)]
    truth = saccade.attention(*wide, **options, return_lse=True, backend="reference")
    ours = saccade.attention(q, k, v, **options, return_lse=True, backend=backend)
    assert ours.out.dtype == torch.bfloat16 and ours.lse.dtype == torch.float32
    assert (ours.out - truth.out.bfloat16()).abs().max() <= truth.out.abs().max() * 2**-7
    assert torch.allclose(ours.lse.double(), truth.lse.double(), atol=1e-5)


def test_bare_codes_have_a_scale_of_one():
    bare = [x.qdata for x in fp8_qkv()]
    ones = [PerHeadFP8(x, torch.ones(x.shape[:2])) for x in bare]
    assert torch.equal(saccade.attention(*bare), saccade.attention(*ones))


def test_no_queries_and_no_keys():
    q, k, v = fp8_qkv()
    nothing = PerHeadFP8(q.qdata[:, :, :0], q.scale)
    assert saccade.attention(nothing, k, v).shape == (2, 4, 0, 16)
    k, v = (PerHeadFP8(x.qdata[:, :, :0], x.scale) for x in (k, v))
    out, lse = saccade.attention(q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16 and (out == 0).all() and lse.isneginf().all()


def test_a_ring_of_codes_is_a_view_too():
    q, k, v = fp8_qkv()
    spans = (Span(4, 0, 2), Span(0, 2, 4))  # positions 0 1 in slots 4 5, then 2 .. 5 in 0 .. 3
    ring = DenseKV(*(x.qdata.view(torch.uint8).roll(4, 2).view(FP8) for x in (k, v)), spans)
    expected = saccade.attention(q, k, v)
    found = attend(make_call(q, PerHeadFP8KV(ring, k.scale, v.scale), mask=saccade.Mask())).out
    assert torch.allclose(found.float(), expected.float(), atol=1e-2)


def test_auto_serves_them_on_any_machine():
    verdicts = dict(saccade.explain(*fp8_qkv()))
    assert verdicts["tiled"] == "chosen"
    assert verdicts["sdpa"] == "cannot: PyTorch's kernels have no fp8"


@pytest.mark.parametrize("backend", OTHERS)
def test_every_other_backend_refuses(backend):
    with pytest.raises(Unsupported, match=f'backend="{backend}".* cannot run this call: '):
        saccade.attention(*fp8_qkv(), backend=backend)


def test_all_three_or_none():
    q, k, v = fp8_qkv()
    with pytest.raises(
        TypeError, match="all be float8_e4m3fn or none of them, got float8_e4m3fn, "
    ):
        saccade.attention(q, k.dequantize(), v.dequantize())
