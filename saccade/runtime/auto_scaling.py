"""Which scaling reaches a length (a stand-in until the real one is merged)."""

from __future__ import annotations

from dataclasses import replace

from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams


def reaching(
    params: ContextParams, facts: ModelFacts, tokens: int
) -> tuple[ContextParams, str | None]:
    """Options that hold `tokens` tokens in context, and one sentence where text needed them to."""
    if params.n_swa is not None or tokens <= facts.n_ctx_train:
        return params, None
    params = params if params.n_ctx else replace(params, n_ctx=tokens)
    if params.rope_scaling_type is not None:
        return params, None
    factor = tokens / facts.n_ctx_train
    return replace(params, rope_scaling_type="yarn", rope_freq_scale=1 / factor), (
        f"{tokens:,} tokens are beyond the {facts.n_ctx_train:,} the model was trained for: "
        f"positions are scaled by YaRN x{factor:.1f} (--rope-scaling none to insist)."
    )
