"""Positions beyond the trained length: the scaling that a plan's command has to ask for."""

from __future__ import annotations

from dataclasses import replace

from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams


def reaching(
    params: ContextParams, facts: ModelFacts, tokens: int
) -> tuple[ContextParams, str | None]:
    """Options that hold `tokens` tokens, and one sentence where they are scaled for it."""
    trained = facts.n_ctx_train
    if params.n_swa is None and tokens != trained:
        params = replace(params, n_ctx=tokens)
    if tokens <= trained or params.n_swa is not None or params.rope_scaling_type is not None:
        return params, None
    scaled = replace(params, rope_scaling_type="yarn", yarn_orig_ctx=trained)
    factor = tokens / trained
    return scaled, (
        f"{tokens:,} tokens are beyond the {trained:,} the model was trained for: positions are "
        f"scaled by YaRN x{factor:.1f}."
    )
