"""RMS norms as one kernel: transformers writes them as eight, a third of all launches of a step.

Only on GPUs, and only for modules that an example shows to be RMS norms.  The fused ones round
once where the original rounds twice.  PyTorch's own takes 6 us for one row on an H200, so steps
have another, which serves Gemma's norms too: they multiply by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops import gemv
from saccade.runtime.step import in_step

Forward = Callable[[Tensor], Tensor]


def plain_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """(module, its fused forward) for every norm that multiplies by its weight."""
    for module, eps in _norms(model, "variance_epsilon", offset=0.0):
        yield module, partial(_fused, weight=module.weight, eps=eps)


def shifted_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """(module, its forward with steps fused) for every norm that multiplies by 1 + weight."""
    for module, eps in _norms(model, "eps", offset=1.0):
        usual = module.forward
        yield module, partial(_fused_in_steps, weight=module.weight, eps=eps, usual=usual)


def _norms(model: nn.Module, eps_name: str, *, offset: float) -> Iterator[tuple[Any, float]]:
    """(module, eps) of RMS norms, by an example for each type."""
    known: dict[tuple[type, float], bool] = {}
    for module in model.modules():
        eps, weight = getattr(module, eps_name, None), getattr(module, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
            continue
        if "forward" in vars(module):  # somebody has replaced it: accelerate's hooks, or we
            continue
        kind = type(module), eps
        if kind not in known:
            known[kind] = _same(module, weight, eps, offset)
        if known[kind]:
            yield module, eps


def _fused(hidden_states: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    if in_step() and gemv.supports_rms_norm(hidden_states, weight):
        return gemv.rms_norm(hidden_states, weight, eps)
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


def _fused_in_steps(x: Tensor, *, weight: Tensor, eps: float, usual: Forward) -> Tensor:
    if in_step() and gemv.supports_rms_norm(x, weight):
        return gemv.rms_norm(x, weight, eps, 1.0)
    return usual(x)


@torch.no_grad()
def _same(module: nn.Module, weight: Tensor, eps: float, offset: float) -> bool:
    x = torch.linspace(-3, 2, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    theirs = module(x)
    ours = F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)
    close = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(weight.dtype, 1e-5)
    return theirs.dtype == x.dtype and torch.allclose(ours, theirs, rtol=close, atol=close)
