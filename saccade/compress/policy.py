"""The protocol of cache policies: from what was observed to what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a policy may look at in one layer after the prompt.

    Attributes:
        q: the newest queries `[B, H, w, D]`, rotary embedding applied.
        k: all keys `[B, Hkv, L, D]`; v: all values `[B, Hkv, L, Dv]`.
        scale: softmax scale of the layer.
        real: bool `[B, Hkv, L]`, False where a head holds fewer keys than others; None: all are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    real: Tensor | None = None


class Policy(Protocol):
    """Scores every key of every KV head; the best ones stay.

    Attributes:
        num_queries: how many of the newest queries the policy wants to see.
        floor: share of the budget that every head gets for sure, where heads compete for the
            rest (`select_across_heads`, a ragged cache); None: all heads keep equally many.
    """

    @property
    def num_queries(self) -> int: ...

    @property
    def floor(self) -> float | None: ...

    def scores(self, observed: Observed) -> Tensor:
        """Importance of each key, `[B, Hkv, L]`; +inf for keys that must stay, -inf for none."""
        ...


def resolve_budget(budget: int | float, length: int) -> int:
    """Keys to keep of `length`: an int is a number of keys, a float a share of them."""
    kept = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(kept, length))


def select(scores: Tensor, kept: int) -> Tensor:
    """The `kept` best keys of each KV head in their original order, int64 `[B, Hkv, kept]`."""
    # Sorting by index afterwards keeps position order, which rings and context shifts rely on.
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values


def select_across_heads(scores: Tensor, kept: int, floor: float) -> Tensor:
    """The best keys of a layer, whichever heads they belong to (Ada-KV, arXiv 2407.11550).

    Each head keeps the `floor * kept` best of its own; then the best of all heads fill up.

    Args:
        scores: `[B, Hkv, L]`, -inf where there is no key.
        kept: keys of a head on average.
        floor: share of `kept` that every head keeps, 0 to 1.

    Returns:
        bool `[B, Hkv, L]` with `kept * Hkv` True a row, or as many as there are keys.
    """
    heads, length = scores.shape[1:]
    sure = min(length, max(1, round(floor * kept)))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(sure, dim=-1).indices, True)
    best = scores.masked_fill(chosen, -torch.inf).flatten(1)
    rest = min(max(0, kept - sure) * heads, best.shape[1])
    chosen.flatten(1).scatter_(-1, best.topk(rest, dim=-1).indices, True)
    return chosen & (scores > -torch.inf)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: `[B, H, ...]` -> `[B, Hkv, ...]`."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def causal_weights(observed: Observed) -> Tensor:
    """Softmax attention of the observed queries over all keys, `[B, H, w, L]` float32."""
    batch, heads, width, dim = observed.q.shape
    kv_heads, length = observed.k.shape[1:3]
    q = observed.q.float().view(batch, kv_heads, heads // kv_heads, width, dim)
    scores = q @ observed.k.float()[:, :, None].mT * observed.scale
    device = scores.device
    q_pos = torch.arange(length - width, length, device=device)[:, None]
    hidden = torch.arange(length, device=device)[None] > q_pos
    if observed.real is not None:
        hidden = hidden | ~observed.real[:, :, None, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).flatten(1, 2)
