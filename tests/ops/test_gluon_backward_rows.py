"""What comes before and after the Gluon gradients: plain Triton kernels, by their definition.

As test_triton.py: on a card, or in the interpreter that it starts.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.ops.attention.nvidia.gluon.backward.rowwise import (
    convert_kernel,
    prepare_kernel,
    sum_kernel,
)
from saccade.ops.gpu.launching import strided
from tests.ops.test_triton import DEVICE, pytestmark, runs_kernels

__all__ = ["pytestmark"]  # on a card these are GPU tests too


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_what_rows_contribute(dim):
    """Rows that see nothing, and those past the end, have weights of 0."""
    out, dout = (random(2, 100, 3, dim).transpose(1, 2) for _ in range(2))
    lse, dlse = random(2, 3, 100), random(2, 3, 100)
    lse[:, 1, 7] = float("-inf")
    delta, stats, dq = torch.empty_like(lse), random(6, 2, 2, 64), random(6, 2, 64 * dim)
    prepare_kernel[(6, 2)](
        strided(out), strided(dout), lse, dlse, delta, stats, dq, 100, 3, D=dim, ROWS=64
    )
    expected = (out * dout).sum(-1) - dlse
    assert torch.allclose(delta, expected, atol=1e-4)
    assert not dq.any()
    top, again = (stats[:, :, i].reshape(2, 3, 128) for i in (0, 1))
    assert torch.allclose(again[..., :100], expected, atol=1e-4) and not again[..., 100:].any()
    weightless = torch.nn.functional.pad(lse.isneginf(), (0, 28), value=True)
    assert torch.equal(top.isposinf(), weightless)
    assert torch.allclose(top[~weightless], lse[lse.isfinite()] * 1.4426950408889634)


@runs_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_registers_become_rows(dim):
    """Where a thread of a warpgroup adds its numbers: the layout of wgmma's accumulators."""
    dq = random(1, 2, 100, dim)
    rows, columns = torch.arange(64)[:, None], torch.arange(dim)[None, :]
    half, column = columns // (dim // 2), columns % (dim // 2)
    thread = rows // 16 * 32 + rows % 8 * 4 + column % 8 // 2
    place = half * (32 * dim) + column // 8 * 512 + thread * 4 + rows % 16 // 8 * 2 + column % 2
    assert sorted(place.flatten().tolist()) == list(range(64 * dim))
    summed = random(2, 2, 64 * dim)
    padded = torch.nn.functional.pad(dq[0], (0, 0, 0, 28)).reshape(2, 2, 64, dim)
    summed[:, :, place.flatten().to(DEVICE)] = padded.flatten(2)
    out = torch.empty_like(dq)
    convert_kernel[(2, 2)](summed, strided(out), 0.5, 100, 2, D=dim, ROWS=64)
    assert torch.equal(out, dq * 0.5)


@runs_kernels
@pytest.mark.parametrize("splits", [2, 3])
def test_shares_are_summed(splits):
    dk, dv = (random(2, 3 * splits, 100, 64) for _ in range(2))
    sums = [random(2, 3, 100, 64) for _ in range(2)]
    sum_kernel[(6, 2)](dk, dv, *sums, 100, SPLITS=splits, D=64, ROWS=64)
    for found, parts in zip(sums, (dk, dv), strict=True):
        assert torch.allclose(found, parts.unflatten(1, (3, splits)).sum(2), atol=1e-5)
