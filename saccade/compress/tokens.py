"""Token-level compression: keep the most important tokens of a text before a model reads it.

The idea of Selective Context (arXiv 2310.06201); `runtime.importance` computes scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Tokens = TypeVar("Tokens", Tensor, Sequence[int])


def compress_context(
    tokens: Tokens, importance_scores: Tensor | Sequence[float], target_len: int
) -> Tokens:
    """The `target_len` tokens with the highest scores, in their original order.

    Of equal scores the earlier token is kept.

    Args:
        tokens: 1-D integer tensor or sequence of token ids.
        importance_scores: one finite-or-infinite number per token; +inf always keeps a token.
        target_len: how many tokens to keep, 1 to len(tokens).

    Returns:
        A tensor for a tensor, a list for any other sequence.

    Raises:
        ValueError: lengths that differ, NaN scores, an empty text, a target out of range.
    """
    scores = torch.as_tensor(importance_scores, dtype=torch.float64)
    length = len(tokens)
    if length == 0:
        raise ValueError("compress_context needs at least one token, got an empty text.")
    if scores.ndim != 1 or len(scores) != length:
        raise ValueError(
            f"importance_scores must hold one number per token: expected [{length}], "
            f"got {list(scores.shape)}."
        )
    if scores.isnan().any():
        at = int(scores.isnan().nonzero()[0])
        raise ValueError(f"importance_scores must not contain NaN, found one at token {at}.")
    if not 1 <= target_len <= length:
        raise ValueError(
            f"target_len must be between 1 and the {length} tokens of the text, got {target_len}."
        )
    order = scores.argsort(descending=True, stable=True)[:target_len]
    kept = order.sort().values
    if isinstance(tokens, Tensor):
        return tokens[kept.to(tokens.device)]
    return [tokens[i] for i in kept.tolist()]  # type: ignore[return-value]
