"""How exact a kernel has to be: it errs at most twice as much as an eager run in its precision.

The truth is the float64 reference.  The eager run is the reference in the precision of the kernel,
on the same inputs.  A small allowance is added, for an eager run that is exact by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput

FACTOR = 2
ALLOWANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LSE_ALLOWANCE = 1e-4


def allowed_error(eager: Tensor, truth: Tensor, allowance: float | None = None) -> float:
    """The largest error of an element; `allowance` defaults to that of the dtype of `eager`."""
    extra = ALLOWANCE[eager.dtype] if allowance is None else allowance
    return FACTOR * largest_error(eager, truth) + extra


def largest_error(found: Tensor, truth: Tensor) -> float:
    """The largest distance of an element from the truth, in float64 on the CPU."""
    assert found.shape == truth.shape, f"expected shape {truth.shape}, got {found.shape}"
    if found.numel() == 0:
        return 0.0
    return float((found.detach().cpu().double() - truth.detach().cpu().double()).abs().max())


def assert_as_exact(
    ours: Tensor, eager: Tensor, truth: Tensor, allowance: float | None = None
) -> None:
    """Fail unless a kernel's tensor has the dtype of the eager run and at most twice its error."""
    assert ours.dtype == eager.dtype
    assert not ours.isnan().any(), "the kernel's result holds NaN"
    error, allowed = largest_error(ours, truth), allowed_error(eager, truth, allowance)
    assert error <= allowed, f"error {error:.3g} is above the allowed {allowed:.3g}"


def assert_lse(ours: Tensor, truth: Tensor, allowance: float = LSE_ALLOWANCE) -> None:
    """Fail unless a float32 lse is near the truth, and -inf exactly where the truth is."""
    ours, truth = ours.cpu(), truth.cpu()
    assert ours.dtype == torch.float32
    assert torch.equal(ours.isneginf(), truth.isneginf())
    error = largest_error(ours.nan_to_num(neginf=0), truth.nan_to_num(neginf=0))
    assert error <= allowance, f"lse is off by {error:.3g}, allowed {allowance:.3g}"


def assert_output(
    ours: AttentionOutput,
    eager: AttentionOutput,
    truth: AttentionOutput,
    allowance: float | None = None,
    lse_allowance: float = LSE_ALLOWANCE,
) -> None:
    """Fail unless output and lse of a kernel are as exact as the rule requires."""
    assert_as_exact(ours.out, eager.out, truth.out, allowance)
    assert_lse(ours.lse, truth.lse, lse_allowance)
