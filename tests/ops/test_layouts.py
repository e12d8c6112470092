"""Strides change no result: every backend, every layout of q, k and v, and of a view's tensors."""

import pytest
import torch

from saccade.core import DenseKV, Mask, Unsupported
from saccade.ops import attend, attention, make_call
from tests.support import views
from tests.support.cases import HERE
from tests.support.gpu import HOPPER
from tests.support.layouts import LAYOUTS, SAME_NUMBERS
from tests.support.random_inputs import qkv
from tests.support.tolerance import largest_error
from tests.support.view_doors import moved

SHAPES = [(4, 2, 33, 40, 16), (4, 2, 1, 40, 16), (3, 3, 20, 20, 1), (2, 1, 5, 3, 24)]
BACKENDS = ["auto", *HERE]


def solve(tensors, backend, *, grad=False, **options):
    leaves = [x.detach().requires_grad_(grad) for x in tensors]
    out = attention(*leaves, backend=backend, **options)
    return [out, *(torch.autograd.grad(out.square().sum(), leaves) if grad else ())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_one_strange_tensor(backend, layout, place):
    for heads, kv_heads, q_len, k_len, dim in SHAPES:
        tensors = list(qkv(heads, kv_heads, q_len, k_len, dim))
        tensors[place] = LAYOUTS[layout](tensors[place])
        for causal, grad in ((True, True), (False, False)):
            wide = [x.double().contiguous() for x in tensors]
            exact = solve(wide, "reference", grad=grad, causal=causal)
            try:
                ours = solve(tensors, backend, grad=grad, causal=causal)
            except Unsupported as error:
                assert backend == "cpu" and "unit last stride" in str(error)
                continue
            for found, true in zip(ours, exact, strict=True):
                assert largest_error(found, true) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("backend", ["auto", "triton", "gluon", "gluon_triton", "sdpa", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_one_strange_tensor_on_gpu(backend, layout, place):
    """Rows at addresses that no kernel can load in vectors are copied, or read one by one."""
    for heads, kv_heads, q_len, k_len, dim in ((4, 2, 33, 40, 64), (8, 2, 1, 300, 128)):
        tensors = [x.bfloat16().cuda() for x in qkv(heads, kv_heads, q_len, k_len, dim)]
        with torch.device("cuda"):
            tensors[place] = LAYOUTS[layout](tensors[place])
        for causal, grad in ((True, True), (False, False)):
            wide = [x.double().contiguous() for x in tensors]
            exact = solve(wide, "reference", grad=grad, causal=causal)
            try:
                ours = solve(tensors, backend, grad=grad, causal=causal)
            except Unsupported as error:
                assert backend != "auto", error
                continue
            for found, true in zip(ours, exact, strict=True):
                size = max(1.0, float(true.detach().abs().max()))
                assert largest_error(found, true) < 0.02 * size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strange_masks(layout):
    """attn_mask, key_padding, kv_lens, offsets and slopes at other strides."""
    q, k, v = qkv(4, 2, 6, 20, 16)
    options = {
        "attn_mask": LAYOUTS[layout](torch.rand(2, 4, 6, 20) < 0.7),
        "key_padding": (torch.rand(20, 4) < 0.7).T[::2],
        "kv_lens": torch.tensor([20, 0, 13])[::2],
        "q_offset": torch.tensor([14]).expand(2),
        "alibi_slopes": torch.rand(8)[::2].expand(2, 4),
        "sink_logits": torch.randn(4, 3)[:, 1],
    }
    plain = {name: x.contiguous() for name, x in options.items()}
    truth = make_call(q.double(), DenseKV(k.double(), v.double()), mask=Mask(), **plain)
    exact = attend(truth, backend="reference")
    for backend in BACKENDS:
        ours = attend(make_call(q, DenseKV(k, v), mask=Mask(), **options), backend=backend)
        assert largest_error(ours.out, exact.out) < 1e-4


def stored():
    q, k, v = qkv(4, 2, 5, 40, 16)
    return q, {
        "ring": views.ring(k, v),
        "paged": views.paged(k, v, 8, [40, 17]),
        "ragged": views.ragged(k, v, torch.rand(2, 2, 40) < 0.6),
        "int8": views.quantized(k, v, 8, group=16),
        "int8_alone": views.quantized(k[:, :, :32], v[:, :, :32], 0, group=16),
        "int4": views.quantized(k, v, 8, bits=4, group=16),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", SAME_NUMBERS)
def test_strange_storage(backend, layout):
    q, kinds = stored()
    for view in kinds.values():
        exact = attend(make_call(q, view, mask=Mask()), backend="reference")
        strange = moved(view, SAME_NUMBERS[layout])
        try:
            ours = attend(make_call(q, strange, mask=Mask()), backend=backend)
        except Unsupported as error:
            assert backend == "cpu" and "unit last stride" in str(error)
            continue
        assert largest_error(ours.out, exact.out) < 1e-4


@pytest.mark.parametrize("scale", [-0.5, 0.0, -0.0, 1e-30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_finite_scale(backend, scale):
    for q_len in (1, 7, 20):
        tensors = qkv(4, 2, q_len, 20, 16)
        wide = [x.double() for x in tensors]
        for options in ({}, {"causal": False}, {"window": 5}):
            exact = solve(wide, "reference", grad=True, scale=scale, **options)
            ours = solve(tensors, backend, grad=True, scale=scale, **options)
            for found, true in zip(ours, exact, strict=True):
                assert largest_error(found, true) < 1e-4
