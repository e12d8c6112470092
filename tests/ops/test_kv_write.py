"""Writes into a cache: RoPE, Hadamard transform, quantizing; by PyTorch, and by kernels as PyTorch.

As test_triton.py, on a GPU or in the interpreter that it starts; the PyTorch part anywhere.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import QuantizedKV, formats
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.ops.kv_write.append import append, apply_pending, apply_rope_qk
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.kv_write.quantize import (
    dequantize_range,
    quantize_keys_into,
    quantize_values_into,
)
from saccade.ops.kv_write.records import KVSlots, PendingRope
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels
from tests.support.cases import on

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too

FORMATS = [(8, False), (4, False), (8, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
def test_rope_by_halves_has_the_same_bits_as_that_of_transformers(dtype, tables):
    """x cos + rotate_half(x) sin, with tables that hold each half twice."""
    angle = (torch.rand(2, 5, 16) * 9).repeat(1, 1, 2)
    q = torch.randn(2, 3, 5, 32).to(dtype)
    rope = PendingRope(q, angle.cos().to(tables), angle.sin().to(tables))
    low, high = rope.q.chunk(2, dim=-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    truth = (rope.q * cos + torch.cat((-high, low), dim=-1) * sin).to(dtype)
    found = apply_pending(rope.q, rope)
    assert found.dtype == dtype and torch.equal(found, truth)


def stored(x, quantize, bits, group, fp8):
    found = quantize(x, bits=bits, group=group, fp8=fp8)
    return QuantizedTensor(*on(DEVICE, *found))


APPENDS = [
    ({}, False, 1, 128),
    ({"rope": True}, False, 1, 64),
    ({"rope": True}, True, 3, 32),
    ({}, True, 1, 16),
    ({"rope": True}, False, 2, 24),
]


@runs_kernels
@pytest.mark.parametrize(("how", "hadamard", "tokens", "dim"), APPENDS, ids=str)
def test_append(how, hadamard, tokens, dim):
    """One kernel for RoPE, Hadamard and write equals PyTorch; other slots are left alone."""
    k, v = torch.randn(2, tokens, 2, dim).transpose(1, 2), torch.randn(2, 2, tokens, dim)
    rope = None
    if how:
        angle = torch.rand(1, tokens, dim // 2).repeat(1, 1, 2)
        rope = PendingRope(torch.randn(2, 4, tokens, dim), angle.cos(), angle.sin())
    stores = [torch.randn(2, 2, 20, dim).repeat(1, 1, 1, 1) for _ in range(2)]
    at, origin = torch.tensor([107, 107]), torch.tensor([100])
    truth = KVSlots(*(x.clone() for x in stores), at, origin)
    q_true = None if rope is None else apply_pending(rope.q, rope)
    k_true = k if rope is None else apply_pending(k, rope)
    truth.k[:, :, 7 : 7 + tokens] = hadamard_transform(k_true) if hadamard else k_true
    truth.v[:, :, 7 : 7 + tokens] = hadamard_transform(v) if hadamard else v
    ours = KVSlots(*on(DEVICE, *stores, at, origin), hadamard)
    k, v = on(DEVICE, k, v)
    rope = None if rope is None else PendingRope(*on(DEVICE, *rope))
    q = append(ours, k, v, rope)
    assert torch.allclose(ours.k.cpu(), truth.k, atol=1e-5)
    assert torch.allclose(ours.v.cpu(), truth.v, atol=1e-5)
    assert q_true is None or torch.allclose(q.cpu(), q_true, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("dim", [2, 16, 128])
def test_hadamard_kernel(dim):
    x = torch.randn(2, 3, 5, dim)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    truth = x @ (torch.tensor(signs) * dim**-0.5)
    assert torch.allclose(hadamard_transform(x.to(DEVICE)).cpu(), truth, atol=1e-5)
    assert torch.allclose(
        hadamard_transform(x.mT.contiguous().mT.to(DEVICE)).cpu(), truth, atol=1e-5
    )


@runs_kernels
@pytest.mark.parametrize("dim", [16, 128, 256, 512] if DEVICE == "cuda" else [16, 128])
@pytest.mark.parametrize("token_major", [False, True])
def test_hadamard_of_many_rows(dim, token_major):
    """More rows than have a program of their own, not a multiple of a tile.

    Triton's interpreter multiplies bfloat16 as if its bits were integers.
    """
    x = torch.randn(1, 1450, 3, dim).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)
    x = x.transpose(1, 2) if token_major else x
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    truth = x.float() @ (torch.tensor(signs) * dim**-0.5)
    ours = hadamard_transform(x.to(DEVICE)).cpu()
    assert torch.allclose(ours.float(), truth, rtol=2**-8, atol=1e-5)
    assert ours.stride() == x.stride()


@runs_kernels
@pytest.mark.parametrize("tokens", [3, 70_000] if DEVICE == "cuda" else [3])
def test_rope_without_a_cache(tokens):
    """Also for more tokens than grid axes y and z may have."""
    angle = torch.rand(2, tokens, 8).repeat(1, 1, 2)
    q, k = torch.randn(2, tokens, 4, 16).transpose(1, 2), torch.randn(2, 2, tokens, 16)
    rope = PendingRope(*on(DEVICE, q, angle.cos(), angle.sin()))
    both = apply_rope_qk(k.to(DEVICE), rope)
    for ours, x in zip(both, (q, k), strict=True):
        assert torch.allclose(ours.cpu(), apply_pending(x.to(DEVICE), rope).cpu(), atol=1e-5)


def empty_storage(shape, bits, fp8, rows, groups):
    """A view of larger storage, so that strides matter."""
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
def test_quantizing_is_the_definition(bits, fp8, dim, group, dtype):
    x = torch.randn(2, 3, 4 * group, dim).to(dtype)
    x[0, 0, :group] = 0.25  # a group without any range
    x[0, 1, :group] = 1000.3
    x[0, 2, 1], x[1, 0, :group, 1] = torch.nan, torch.nan
    x[1, 1] *= 1e-6  # steps below the smallest of float16
    x[1, 2] *= 1e4
    v_group = dim if dim % group else group
    for quantize_into, quantize, rows, groups, of in (
        (quantize_keys_into, quantize_keys, 4, dim, group),
        (quantize_values_into, quantize_values, 4 * group, dim // v_group, v_group),
    ):
        into = empty_storage(x.shape, bits, fp8, rows, groups)
        quantize_into(on(DEVICE, x), into, bits=bits, group=of)
        truth = quantize(x, bits=bits, group=of, fp8=fp8)
        for part, expected in zip(into[1:], truth[1:], strict=True):
            assert torch.equal(part.cpu(), expected)
        assert torch.equal(into.qdata.cpu().view(torch.uint8), truth.qdata.view(torch.uint8))


@runs_kernels
@pytest.mark.parametrize(("bits", "fp8"), FORMATS)
def test_dequantizing_is_the_definition(bits, fp8):
    k, v = torch.randn(2, 2, 64, 48), torch.randn(2, 2, 64, 48)
    keys, values = (
        stored(k, quantize_keys, bits, 16, fp8),
        stored(v, quantize_values, bits, 24, fp8),
    )
    nothing = torch.empty(2, 2, 0, 48, device=DEVICE)
    kv = QuantizedKV(keys, values, nothing, nothing, bits, bits, 16)
    found = dequantize_range(kv, 16, 48)
    tile = next(iter(kv.tiles(((16, 48),), 32)))
    for ours, truth in zip(found, (tile.k, tile.v), strict=True):
        assert torch.allclose(ours, truth, atol=1e-6)
