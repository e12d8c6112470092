"""Distance of a model's predictions from the text and from the exact model.

Perplexity alone hides damage that averages out, so the divergence of every prediction from the
exact model's is measured too (as llama.cpp's --kl-divergence does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saccade.runtime.importance import HEAD_CHUNK


class HasLogits(Protocol):
    """What turns hidden states into logits."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` float32 of hidden states `[..., hidden]`."""
        ...


@dataclass(frozen=True, slots=True)
class Divergence:
    """Means over scored tokens: KL in nats with its standard error, share of equal best tokens."""

    kl: float
    kl_se: float
    same_top: float


def log_probs(model: HasLogits, hidden: Tensor) -> Tensor:
    """Next-token log-probabilities `[n, vocab]` float32 of hidden states `[n, hidden]`."""
    return torch.cat([model.logits(part).log_softmax(-1) for part in hidden.split(HEAD_CHUNK)])


def losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods `[n]`, float64, of tokens `[n]` under `[n, vocab]`."""
    wanted = targets.to(log_probs.device)[:, None]
    return -log_probs.gather(-1, wanted)[:, 0].double().cpu()


def perplexity(nll: Tensor) -> tuple[float, float]:
    """exp(mean) of negative log-likelihoods `[n]` and its standard error (delta method)."""
    value = _exp(nll.double().mean().item())
    return value, value * _error_of_mean(nll)


def ratio_error(ours: Tensor, theirs: Tensor) -> float:
    """Standard error of the ratio of two perplexities on the same tokens, by paired differences.

    Most of what makes a token hard is the same for both, so this is much smaller than the errors
    of the two perplexities would suggest.

    Args:
        ours, theirs: negative log-likelihoods `[n]`.
    """
    differences = ours.double() - theirs.double()
    return _exp(differences.mean().item()) * _error_of_mean(differences)


def divergence(ours: Tensor, exact: Tensor) -> Divergence:
    """Of log-probabilities `ours` from `exact`, both `[n, vocab]`."""
    kl = torch.cat(
        [
            torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
            for p, q in zip(exact.split(HEAD_CHUNK), ours.split(HEAD_CHUNK), strict=True)
        ]
    ).double()
    same = (ours.argmax(-1) == exact.argmax(-1)).double().mean().item()
    return Divergence(max(0.0, kl.mean().item()), _error_of_mean(kl), same)


def _error_of_mean(values: Tensor) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(values.double().var().item() / len(values))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
