"""Importance of the tokens of a text, computed by the model that will read it.

self-information    -log p(token | the text before) (Selective Context, arXiv 2310.06201)
contrastive         how much likelier a question makes the token (LongLLMLingua, arXiv 2310.06839)
received attention  attention weight of a token, averaged over layers, heads and the queries that
                    attend to it (H2O, arXiv 2306.14048), or over those of a question alone
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress import Received, received_attention
from saccade.core import AttentionOutput, BadInput
from saccade.ops import AttentionCall, attend_received
from saccade.runtime.context import Context
from saccade.runtime.stats import OnProgress

HEAD_CHUNK = 64
"""Hidden states whose logits are computed at once: the logits of a token take 4 * vocab bytes."""


def token_log_probs(ctx: Context, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token `[n]` from hidden states `[n, hidden]`, float32 `[n]` in nats."""
    parts = [
        ctx.logits(states).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        for states, wanted in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def self_information(
    ctx: Context,
    tokens: Tensor,
    *,
    before: Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """-log p of each token `[n]` given those before, in nats, float32.

    Args:
        ctx: a context without tokens; it reads them.
        tokens: int64 `[n]`.
        before: int64 `[m]`, read in front of them; without any the first token has no probability:
            its score is +inf, so that it stays.
        on_progress: called with (tokens read, all of them), those before counted.

    Source: Li et al., Selective Context, 2023 (arXiv 2310.06201).
    """
    whole = tokens if before is None else torch.cat((before, tokens))
    skipped = len(whole) - len(tokens)
    wanted = len(tokens) + min(1, skipped)
    hidden = ctx.append(whole, wanted=wanted, on_progress=on_progress)
    scores = torch.full((len(tokens),), torch.inf)
    first = 0 if skipped else 1
    scores[first:] = -token_log_probs(ctx, hidden[:-1], tokens[first:]).cpu()
    return scores


def contrastive_perplexity(
    ctx: Context,
    tokens: Tensor,
    question: Tensor,
    *,
    before: Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """How much likelier a question in front makes each token `[n]`, in nats, float32.

        s_i = -log p(x_i | before, x_<i) + log p(x_i | before, question, x_<i)

    Args:
        ctx: a context without tokens; it reads them twice, and at last holds the question's text.
        tokens: int64 `[n]`.
        question: int64 `[q]`.
        before: int64 `[m]`, read in front of everything; without any the first score is +inf.
        on_progress: called with (tokens read, all of them), of both readings.

    Source: Jiang et al., LongLLMLingua, 2023 (arXiv 2310.06839).
    """
    head = tokens[:0] if before is None else before
    lengths = len(head) + len(tokens), len(head) + len(question) + len(tokens)
    first, second = in_parts(on_progress, lengths)
    plain = self_information(ctx, tokens, before=head, on_progress=first)
    ctx.reset()
    asked = torch.cat((head, question))
    return plain - self_information(ctx, tokens, before=asked, on_progress=second)


def attention_received(
    ctx: Context,
    tokens: Tensor,
    question: Tensor | None = None,
    *,
    before: Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Attention that each token `[n]` receives, summed over layers and heads, float32.

    Each query that has the token in reach counts alike: see `ReceivedAttention`.

    Args:
        ctx: a context without tokens; it reads them.
        tokens: int64 `[n]`.
        question: int64 `[q]`, read behind them; only its queries count then.
        before: int64 `[m]`, read in front of everything.
        on_progress: called with (tokens read, all of them).

    Source: Zhang et al., H2O, 2023 (arXiv 2306.14048); with a question Li et al., SnapKV, 2024
    (arXiv 2404.14469), which asks the same of the end of a prompt.
    """
    whole = tokens if before is None else torch.cat((before, tokens))
    received = ReceivedAttention()
    first, second = in_parts(on_progress, (len(whole), 0 if question is None else len(question)))
    try:
        ctx.cache.observer = received.observe if question is None else None
        ctx.append(whole, on_progress=first)
        if question is not None:
            ctx.cache.observer = received.observe
            ctx.append(question, on_progress=second)
    finally:
        ctx.cache.observer = None
    return received.scores()[len(whole) - len(tokens) : len(whole)]


def in_parts(on_progress: OnProgress | None, lengths: Sequence[int]) -> list[OnProgress | None]:
    """What to call while each of several texts is read, so that they count as one."""
    if on_progress is None:
        return [None] * len(lengths)
    starts = (sum(lengths[:part]) for part in range(len(lengths)))
    return [partial(_show, on_progress, start, sum(lengths)) for start in starts]


def _show(on_progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    on_progress(before + done, total)


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
    check_scorer(ctx)
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if kind == "received_attention":
        return _ranks(attention_received(ctx, ids))
    received, ranks = ReceivedAttention(), list[Tensor]()
    ctx.cache.observer = received.observe if kind != "self_information" else None
    try:
        ranks.append(_ranks(self_information(ctx, ids)))
    finally:
        ctx.cache.observer = None
    if kind != "self_information":
        ranks.append(_ranks(received.scores()))
    return torch.stack(ranks).mean(0)


def check_scorer(ctx: Context) -> None:
    """Raise BadInput unless a context can score tokens: it is empty and observes for no policy."""
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
