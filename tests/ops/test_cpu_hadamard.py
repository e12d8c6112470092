"""Views of Hadamard-transformed keys: the C++ kernels transform queries and outputs themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saccade.core import DenseKV, Mask, PagedKV, Span
from saccade.ops import attend, attention, make_call
from saccade.ops.attention import api, dispatch
from saccade.ops.attention.cpu import binding
from tests.ops.test_cpu import quantized
from tests.support.random_inputs import normal

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")


def matrix(dim):
    """Blocks of the largest power of two that divides `dim`: H[i, j] = (-1)^popcount(i & j)."""
    block = dim & -dim
    i = np.arange(block)
    h = (-1.0) ** np.vectorize(lambda n: bin(n).count("1"))(i[:, None] & i[None]) / block**0.5
    return torch.from_numpy(np.kron(np.eye(dim // block), h))


def transformed(x):
    return (x.double() @ matrix(x.shape[-1])).to(x.dtype)


def untouched(monkeypatch):
    """Python may transform nothing."""

    def refuse(x):
        raise AssertionError("transformed outside of the kernel")

    monkeypatch.setattr(api, "hadamard_transform", refuse)


@pytest.mark.parametrize("q_len", [1, 3, 70])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 40), (72, 576), (5, 2)])
def test_results_are_those_of_plain_keys(target, monkeypatch, dim, value_dim, q_len):
    untouched(monkeypatch)
    q, k, v = normal(2, 6, q_len, dim), normal(2, 2, 90, dim), normal(2, 2, 90, value_dim)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # rows of tokens, as models have them
    stored = DenseKV(transformed(k), transformed(v), hadamard=True)
    ours = attend(make_call(q, stored, mask=Mask(window=60)), backend="cpu")
    plain = attention(q.double(), k.double(), v.double(), window=60, backend="reference")
    assert torch.allclose(ours.out.double(), plain, atol=3e-6)
    lse = attend(make_call(q, DenseKV(k, v), mask=Mask(window=60)), backend="reference").lse
    assert torch.allclose(ours.lse, lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 40])
def test_half_precision_errs_no_more_than_transforming_around_the_kernel(dtype, q_len):
    q, k, v = (normal(1, n, length, 64) for n, length in ((8, q_len), (2, 300), (2, 300)))
    stored = DenseKV(transformed(k).to(dtype), transformed(v).to(dtype), hadamard=True)
    exact = attention(q.to(dtype).double(), k.double(), v.double(), backend="reference")
    call = make_call(q.to(dtype), stored, mask=Mask())
    around = transformed(attend(call.transformed(), backend="cpu").out)
    errors = [
        float((x.double() - exact).abs().max()) for x in (attend(call, backend="cpu").out, around)
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-3


def stored_views():
    k, v = normal(6, 2, 8, 16), normal(6, 2, 8, 16)
    table, lens = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([20, 9])
    return {
        "ring": DenseKV(*(normal(2, 2, 20, 16) for _ in "kv"), (Span(0, 4, 20),), hadamard=True),
        "paged": PagedKV(k, v, table, lens.int(), 20, hadamard=True),
        "quantized": replace(
            quantized(2, 2, 32, 5, 16, 8, group=16, v_group=16, dtype=torch.float32), hadamard=True
        ),
        "four bits": replace(
            quantized(2, 2, 32, 5, 16, 4, group=16, v_group=16, dtype=torch.float32), hadamard=True
        ),
    }


@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("name", stored_views())
def test_every_storage(monkeypatch, name, q_len):
    q, kv = normal(2, 4, q_len, 16), stored_views()[name]
    truth = attend(make_call(q.double(), kv, mask=Mask()), backend="reference")
    untouched(monkeypatch)
    for _ in range(2):  # the second time as a call of a known signature
        ours = attend(make_call(q, kv, mask=Mask()))
        assert torch.allclose(ours.out.double(), truth.out, atol=2e-5)


def test_packed_sequences_and_many_rows(monkeypatch):
    q, k, v = (normal(1, n, 600, 32) for n in (4, 2, 2))
    bounds = torch.tensor([0, 1, 250, 600])
    plain = attention(q.double(), k.double(), v.double(), cu_seqlens=bounds, backend="reference")
    untouched(monkeypatch)
    stored = DenseKV(transformed(k), transformed(v), hadamard=True)
    ours = attend(make_call(q, stored, mask=Mask(), cu_seqlens=bounds), backend="cpu")
    assert torch.allclose(ours.out.double(), plain, atol=3e-6)


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_other_backends_get_transformed_queries(backend):
    q, k, v = normal(2, 6, 4, 64), normal(2, 2, 50, 64), normal(2, 2, 50, 64)
    stored = DenseKV(transformed(k), transformed(v), hadamard=True)
    for _ in range(2):
        ours = attend(make_call(q, stored, mask=Mask()), backend=backend).out
        plain = attention(q.double(), k.double(), v.double(), backend="reference")
        assert torch.allclose(ours.double(), plain, atol=1e-5)


def test_gradients_flow_through_the_transform():
    tensors = [normal(1, 2, 6, 8).requires_grad_() for _ in "qkv"]
    q, k, v = tensors
    h = matrix(8).float()
    call = make_call(q, DenseKV(k @ h, v @ h, hadamard=True), mask=Mask())
    assert not dispatch.transforms(call, "cpu")
    ours = torch.autograd.grad(attend(call).out.sin().sum(), tensors)
    plain = torch.autograd.grad(attention(q, k, v, backend="reference").sin().sum(), tensors)
    for x, y in zip(ours, plain, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
