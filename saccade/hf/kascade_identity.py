"""Which model a plan of Kascade belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from saccade.core import BadInput
from saccade.runtime.params import ContextParams
from saccade.sparse import Kascade


def identity(model: nn.Module) -> dict[str, str]:
    """Class of a model and a fingerprint of its norms, the same in every format of its weights.

    Norms are kept in 16 bits or more where matrices are rounded to 8 or 4; here they are bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and "norm" in name and not weight.is_meta:
            numbers = weight.detach().to(torch.bfloat16).cpu().view(torch.int16)
            digest.update(numbers.numpy().tobytes())
    return {"model": type(model).__name__, "weights": digest.hexdigest()}


def check_plan(model: nn.Module, params: ContextParams) -> None:
    """Raise BadInput where the plan of Kascade was calibrated for another model."""
    plan = params.sparse.plan if isinstance(params.sparse, Kascade) else None
    if plan is None or any(weight.is_meta for weight in model.parameters()):
        return
    here = identity(model)
    if {"model": plan.model, "weights": plan.weights} != here:
        theirs = f"{plan.model} with norms {plan.weights[:12]}"
        raise BadInput(
            f"the plan of Kascade was calibrated for another model: {theirs}, this is "
            f"{here['model']} with norms {here['weights'][:12]}. Use this model's plan, or "
            "calibrate it (saccade.hf.kascade.calibrate_kascade)."
        )
