"""Options under which a model reads more tokens than it was trained for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from saccade.runtime import ContextParams
from saccade.runtime.model import ModelFacts


def reaching(
    params: ContextParams, facts: ModelFacts, tokens: int
) -> tuple[ContextParams, str | None]:
    """Options that hold `tokens` tokens, and a sentence where that needed a scaling."""
    if tokens <= facts.n_ctx_train:
        return params, None
    factor = max(2, math.ceil(tokens / facts.n_ctx_train))
    stretched: dict[str, Any] = {"n_ctx": factor * facts.n_ctx_train}
    scaled = replace(params, rope_scaling_type="yarn", yarn_orig_ctx=facts.n_ctx_train, **stretched)
    return scaled, f"positions are scaled by YaRN x{factor} beyond {facts.n_ctx_train} tokens"
