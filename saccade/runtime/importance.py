"""Importance of the tokens of a text, computed by the model that will read it.

self-information    -log p(token | the text before) (Selective Context, arXiv 2310.06201)
received attention  attention weight of a token, averaged over layers, heads and the queries that
                    attend to it (H2O, arXiv 2306.14048)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress import Received, received_attention
from saccade.core import AttentionOutput, BadInput
from saccade.ops import AttentionCall, attend_received
from saccade.runtime.context import Context

HEAD_CHUNK = 64
"""Hidden states whose logits are computed at once: the logits of a token take 4 * vocab bytes."""


def token_log_probs(ctx: Context, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token `[n]` from hidden states `[n, hidden]`, float32 `[n]` in nats."""
    parts = [
        ctx.logits(states).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        for states, wanted in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def self_information(ctx: Context, tokens: Tensor) -> Tensor:
    """-log p of each token `[n]` given those before, in nats; +inf for the first, which stays.

    Args:
        ctx: a context without tokens; it reads them.
        tokens: int64 `[n]`.

    Source: Li et al., Selective Context, 2023 (arXiv 2310.06201).
    """
    hidden = ctx.append(tokens, wanted=len(tokens))
    scores = torch.full((len(tokens),), torch.inf)
    scores[1:] = -token_log_probs(ctx, hidden[:-1], tokens[1:])
    return scores


class ReceivedAttention:
    """Observer that sums the attention every token receives; see `received_attention`."""

    def __init__(self) -> None:
        self._layers: dict[int, Received] = {}

    def observe(self, layer: int, call: AttentionCall, backend: str) -> AttentionOutput:
        """Add one chunk of one layer (batch 1); see `runtime.model.Observer`."""
        result, received = attend_received(call, backend=backend)
        new = Received(*(x[0].cpu() for x in received_attention(call, received)))
        older = self._layers.get(layer)
        if older is not None:
            grown = (F.pad(x, (0, len(new.mass) - len(x))) for x in older)
            new = Received(*map(torch.add, new, grown))
        self._layers[layer] = new
        return result

    def scores(self) -> Tensor:
        """Attention received, divided by the number of queries in reach, summed over layers `[n]`.

        A query of a sliding layer reaches the keys of its window alone, so tokens are compared by
        what the queries gave that could have given something.
        """
        shares = [x.mass / x.queries.clamp_min(1) for x in self._layers.values()]
        return torch.stack(shares).sum(0)


def token_importance(
    ctx: Context, tokens: Sequence[int] | Tensor, *, kind: str = "received_attention"
) -> Tensor:
    """Scores `[n]` for `compress_context`: ranks between 0 and 1 by one or both kinds.

    Args:
        ctx: a context without tokens; it reads them.
        tokens: int64 `[n]`.
        kind: "received_attention", "self_information" or "both" (the mean of the two ranks).  The
            default needs no logits and keeps more: half of 1,536 tokens cost SmolLM2-135M a KL of
            0.06, 0.65 and 0.25 nats in this order.

    Raises:
        ValueError: an unknown kind.
        BadInput: a context that holds tokens or has a kv_policy.
    """
    kinds = ("self_information", "received_attention", "both")
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(kinds)}.")
    _check_context(ctx)
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    received, ranks = ReceivedAttention(), list[Tensor]()
    ctx.cache.observer = received.observe if kind != "self_information" else None
    try:
        if kind == "received_attention":
            ctx.append(ids)
        else:
            ranks.append(_ranks(self_information(ctx, ids)))
    finally:
        ctx.cache.observer = None
    if kind != "self_information":
        ranks.append(_ranks(received.scores()))
    return torch.stack(ranks).mean(0)


def _check_context(ctx: Context) -> None:
    if ctx.seen:
        raise BadInput(
            f"token_importance needs a context without tokens, this one has {ctx.seen}. "
            "Call reset() first."
        )
    if ctx.params.kv_policy is not None:
        raise BadInput(
            f"token_importance needs a context without kv_policy, which observes the same layers, "
            f"got {ctx.params.kv_policy!r}. Leave it out."
        )


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each score, 0 for the lowest to 1 for the highest."""
    return scores.argsort().argsort().float() / max(1, len(scores) - 1)
