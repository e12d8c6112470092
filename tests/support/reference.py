"""The contract of backends: output and lse of a call against the float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops import attention
from tests.support.cases import Case, on
from tests.support.tolerance import LSE_ALLOWANCE, assert_output


def truth_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Output and lse in float64."""
    wide = (x.double() for x in (q, k, v))
    return _run(*wide, backend="reference", **options)


def eager_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Output and lse by the reference in the precision of the tensors."""
    return _run(q, k, v, backend="reference", **options)


def check_case(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    allowance: float | None = None,
    lse_allowance: float = LSE_ALLOWANCE,
) -> None:
    """Fail unless a backend solves a case as exactly as tests/support/tolerance.py requires."""
    *tensors, options = case.inputs()
    tensors = [x.to(dtype) for x in tensors]
    moved = on(device, *tensors)
    ours = _run(*moved, **on(device, options), backend=backend)
    truth, eager = truth_of(*tensors, **options), eager_of(*tensors, **options)
    assert_output(ours, eager, truth, allowance, lse_allowance)


def gradients(
    backend: str, tensors: list[Tensor], weights: tuple[Tensor, Tensor], **options: Any
) -> list[Tensor]:
    """Gradients of q, k, v (and sink_logits) of a weighted sum of outputs and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if "sink_logits" in options:
        leaves.append(options["sink_logits"].detach().clone().requires_grad_())
        options["sink_logits"] = leaves[3]
    out, lse = _run(*leaves[:3], backend=backend, **options)
    loss = (out.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
    return list(torch.autograd.grad(loss, leaves))


def _run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    found = attention(q, k, v, return_lse=True, **options)
    assert isinstance(found, AttentionOutput)
    return found
