"""Perplexity by position, inside and past the trained length, with and without RoPE scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.evals.quality import perplexity
from saccade.report.comparison import Curve
from saccade.runtime import Context, ContextParams, Model
from saccade.runtime.importance import token_log_probs

BLOCK = 1024


def position_params(length: int, n_ctx_train: int, n_batch: int) -> dict[str, ContextParams]:
    """The plain model and three RoPE scalings that reach `length` positions."""
    factor = max(2, math.ceil(length / n_ctx_train))
    stretched = {"n_ctx": factor * n_ctx_train, "yarn_orig_ctx": n_ctx_train}

    def params(**options: object) -> ContextParams:
        return ContextParams(n_batch=n_batch, flash_attn="enabled", **options)  # type: ignore[arg-type]

    return {
        "plain": params(n_ctx=factor * n_ctx_train, rope_scaling_type="none"),
        f"linear x{factor}": params(rope_scaling_type="linear", **stretched),
        f"NTK x{factor}": params(rope_scaling_type="ntk", **stretched),
        f"YaRN x{factor}": params(rope_scaling_type="yarn", **stretched),
    }


def measure_curve(name: str, model: Model, params: ContextParams, tokens: Tensor) -> Curve:
    """Perplexity of each block of 1024 tokens of a text read from its start."""
    curve = Curve(name=name, block=BLOCK)
    with Context(model, params, reserve=len(tokens)) as ctx:
        last: Tensor | None = None
        for start in range(0, len(tokens), BLOCK):
            block = tokens[start : start + BLOCK]
            hidden = ctx.append(block, wanted=len(block))
            states = hidden[:-1] if last is None else torch.cat((last, hidden[:-1]))
            targets = block[1:] if last is None else block
            last = hidden[-1:]
            wanted = targets.to(states.device)
            value = perplexity(-token_log_probs(ctx, states, wanted))[0]
            if math.isfinite(value):
                curve.positions.append(start)
                curve.perplexity.append(value)
    return curve
