"""Distance of a model's predictions from the text and from the exact model.

Perplexity alone hides damage that averages out, so the divergence of every prediction from the
exact model's is measured too (as llama.cpp's --kl-divergence does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.runtime import Context
from saccade.runtime.importance import HEAD_CHUNK


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over scored tokens, each with the standard error of the mean where it has one."""

    perplexity: float
    perplexity_se: float
    kl: float
    kl_se: float
    same_top: float


def log_probs(ctx: Context, hidden: Tensor) -> Tensor:
    """Next-token log-probabilities `[n, vocab]` float32 of hidden states `[n, hidden]`."""
    return torch.cat([ctx.logits(part).log_softmax(-1) for part in hidden.split(HEAD_CHUNK)])


def perplexity(nll: Tensor) -> tuple[float, float]:
    """exp(mean) of negative log-likelihoods `[n]` and its standard error (delta method)."""
    value = nll.double().mean().exp().item()
    if len(nll) < 2:
        return value, math.nan
    return value, value * math.sqrt(nll.double().var().item() / len(nll))


def compare(ours: Tensor, exact: Tensor, targets: Tensor) -> Quality:
    """Quality of log-probabilities `ours` `[n, vocab]` for tokens `targets` `[n]`.

    Args:
        exact: log-probabilities of the exact model, same shape.
    """
    nll = -ours.gather(-1, targets[:, None])[:, 0]
    value, error = perplexity(nll)
    kl = torch.cat(
        [
            (p.exp() * (p - q)).sum(-1)
            for p, q in zip(exact.split(HEAD_CHUNK), ours.split(HEAD_CHUNK), strict=True)
        ]
    ).double()
    same = (ours.argmax(-1) == exact.argmax(-1)).double().mean().item()
    kl_se = math.sqrt(kl.var().item() / len(kl)) if len(kl) > 1 else math.nan
    return Quality(value, error, max(0.0, kl.mean().item()), kl_se, same)
