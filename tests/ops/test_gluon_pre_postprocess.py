"""Preprocess and postprocess kernels of the Gluon gradients, against their definition.

They are plain Triton kernels and run as test_triton.py: on a GPU, or in the interpreter that it
starts.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.ops.attention.nvidia.gluon.backward.postprocess import (
    convert_dq_kernel,
    sum_dkv_kernel,
)
from saccade.ops.attention.nvidia.gluon.backward.preprocess import preprocess_kernel
from saccade.ops.gpu.launching import strided
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_lse_and_delta_of_rows(dim):
    """Rows without a visible key, and rows past the end, have weights of 0."""
    out, dout = (random(2, 100, 3, dim).transpose(1, 2) for _ in range(2))
    lse, dlse = random(2, 3, 100), random(2, 3, 100)
    lse[:, 1, 7] = float("-inf")
    delta, lse_delta, dq = torch.empty_like(lse), random(6, 2, 2, 64), random(6, 2, 64 * dim)
    preprocess_kernel[(6, 2)](
        strided(out), strided(dout), lse, dlse, delta, lse_delta, dq, 100, 3, D=dim, BLOCK_M=64
    )
    expected = (out * dout).sum(-1) - dlse
    assert torch.allclose(delta, expected, atol=1e-4)
    assert not dq.any()
    lse_log2, copy = (lse_delta[:, :, i].reshape(2, 3, 128) for i in (0, 1))
    assert torch.allclose(copy[..., :100], expected, atol=1e-4) and not copy[..., 100:].any()
    weightless = torch.nn.functional.pad(lse.isneginf(), (0, 28), value=True)
    assert torch.equal(lse_log2.isposinf(), weightless)
    assert torch.allclose(lse_log2[~weightless], lse[lse.isfinite()] * 1.4426950408889634)


@runs_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_dq_accumulator_becomes_rows(dim):
    """The accumulator is in the order of the registers of wgmma's accumulators."""
    dq = random(1, 2, 100, dim)
    rows, columns = torch.arange(64)[:, None], torch.arange(dim)[None, :]
    half, column = columns // (dim // 2), columns % (dim // 2)
    thread = rows // 16 * 32 + rows % 8 * 4 + column % 8 // 2
    place = half * (32 * dim) + column // 8 * 512 + thread * 4 + rows % 16 // 8 * 2 + column % 2
    assert sorted(place.flatten().tolist()) == list(range(64 * dim))
    dq_accum = random(2, 2, 64 * dim)
    padded = torch.nn.functional.pad(dq[0], (0, 0, 0, 28)).reshape(2, 2, 64, dim)
    dq_accum[:, :, place.flatten().to(DEVICE)] = padded.flatten(2)
    out = torch.empty_like(dq)
    convert_dq_kernel[(2, 2)](dq_accum, strided(out), 0.5, 100, 2, D=dim, BLOCK_M=64)
    assert torch.equal(out, dq * 0.5)


@runs_kernels
@pytest.mark.parametrize("splits", [2, 3])
def test_gradients_of_splits_are_summed(splits):
    dk, dv = (random(2, 3 * splits, 100, 64) for _ in range(2))
    sums = [random(2, 3, 100, 64) for _ in range(2)]
    sum_dkv_kernel[(6, 2)](dk, dv, *sums, 100, SPLITS=splits, D=64, ROWS=64)
    for found, parts in zip(sums, (dk, dv), strict=True):
        assert torch.allclose(found, parts.unflatten(1, (3, splits)).sum(2), atol=1e-5)
