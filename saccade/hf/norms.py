"""RMS norms as one kernel: transformers writes them as eight, a third of all launches of a step.

Only on GPUs, and only for modules that an example shows to be plain RMS norms.  The fused one
rounds once where the original rounds twice.  PyTorch's own takes 6 us for one row on an H200, so
steps of one row have another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops import one_row
from saccade.runtime.step import in_step


def plain_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """(module, its fused forward) for every RMS norm of a model."""
    known: dict[tuple[type, float], bool] = {}
    for module in model.modules():
        eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
            continue
        if "forward" in vars(module):  # somebody has replaced it: accelerate's hooks, or we
            continue
        fused = partial(_fused, weight=weight, eps=eps)
        kind = type(module), eps
        if kind not in known:
            known[kind] = _same(module, fused, weight)
        if known[kind]:
            yield module, fused


def _fused(hidden_states: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    if in_step() and one_row.serves(hidden_states) and weight.dtype == hidden_states.dtype:
        return one_row.norm(hidden_states, weight, eps)
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


@torch.no_grad()
def _same(module: nn.Module, fused: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    x = torch.linspace(-3, 2, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    theirs = module(x)
    close = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(weight.dtype, 1e-5)
    return theirs.dtype == x.dtype and torch.allclose(fused(x), theirs, rtol=close, atol=close)
