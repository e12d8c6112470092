"""RMS norms as one kernel: transformers writes them as eight, a third of all launches of a step.

Only classes of the allowlist are replaced.  The fused ones round once where the original rounds
twice.  PyTorch's own kernel takes 6 us for one row on an H200, so steps have another, which serves
Gemma's norms too: they multiply by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import gemv
from saccade.runtime.step import in_step

Forward = Callable[..., Any]
Enabled = Callable[[], bool]
"""Whether the run in force wants fused layers."""

EPS: Final = {"rms_norm": "variance_epsilon", "rms_norm_plus_one": "eps"}
"""Under which name a kind of norm keeps what it adds to the mean of squares."""


def steps() -> bool:
    """Whether kernels of a step may run: their code is not for torch.compile to trace."""
    return not torch.compiler.is_compiling() and in_step()


def norm_forward(norm: Any, kind: str | None, enabled: Enabled) -> Forward | None:
    """What replaces the forward of an RMS norm of a listed kind; None for anything else."""
    if kind not in EPS:
        return None
    eps, weight = getattr(norm, EPS[kind], None), getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    return _fused(norm, eps, enabled) if kind == "rms_norm" else _plus_one(norm, eps, enabled)


def _fused(norm: Any, eps: float, enabled: Enabled) -> Forward:
    """weight * x / rms(x)."""
    original = norm.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if not enabled():
            return original(hidden_states)
        weight = norm.weight
        if steps() and gemv.supports_rms_norm(hidden_states, weight):
            return gemv.rms_norm(hidden_states, weight, eps)
        return F.rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


def _plus_one(norm: Any, eps: float, enabled: Enabled) -> Forward:
    """(1 + weight) * x / rms(x), fused in steps alone."""
    original = norm.forward

    def forward(x: Tensor) -> Tensor:
        if steps() and enabled() and gemv.supports_rms_norm(x, norm.weight):
            return gemv.rms_norm(x, norm.weight, eps, 1.0)
        return original(x)

    return forward
