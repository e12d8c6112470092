"""The protocol of cache policies: scores for the keys of a layer, and the selection by budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """What a policy scores the keys of one layer by, after the prompt.

    Attributes:
        q: queries of the observation window, the newest w tokens: `[B, H, w, D]`, after RoPE.
        k: all keys `[B, Hkv, L, D]`; v: all values `[B, Hkv, L, Dv]`.
        scale: softmax scale of the layer.
        key_mask: bool `[B, Hkv, L]`, True where a head has a key, for heads with fewer keys than
            others; None: every head has L keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    key_mask: Tensor | None = None


class Policy(Protocol):
    """Scores every key of every KV head; the cache keeps those with the highest scores."""

    @property
    def num_queries(self) -> int:
        """Queries of the observation window that the policy needs."""
        ...

    @property
    def floor(self) -> float | None:
        """Share of the budget that every head keeps, None where all heads keep equally many.

        Under a share, the heads of a layer compete for the rest (`select_across_heads`), which
        needs a ragged cache.
        """
        ...

    def scores(self, observation: LayerObservation) -> Tensor:
        """Importance of each key, `[B, Hkv, L]`; +inf for keys that must stay, -inf for no key."""
        ...


def resolve_budget(budget: int | float, length: int) -> int:
    """Keys to keep of `length`, 1 to `length`: an int is a number of keys, a float a share."""
    kept = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(kept, length))


def select(scores: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` highest scores of each KV head, ascending, int64 `[B, Hkv, kept]`."""
    # Ascending indices keep the order of positions, which causal attention over slots relies on.
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values


def select_across_heads(scores: Tensor, kept: int, floor: float) -> Tensor:
    """The highest scores of a layer, whichever heads they belong to (Ada-KV, arXiv 2407.11550).

    Each head keeps its own `floor * kept` best keys; the best keys of all heads fill the rest.

    Args:
        scores: `[B, Hkv, L]`, -inf where there is no key.
        kept: keys of a head on average.
        floor: share of `kept` that every head keeps, 0 to 1.

    Returns:
        bool `[B, Hkv, L]` with `kept * Hkv` True a row, or as many as there are keys.
    """
    heads, length = scores.shape[1:]
    guaranteed = min(length, max(1, round(floor * kept)))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(guaranteed, dim=-1).indices, True)
    others = scores.masked_fill(chosen, -torch.inf).flatten(1)
    rest = min(max(0, kept - guaranteed) * heads, others.shape[1])
    chosen.flatten(1).scatter_(-1, others.topk(rest, dim=-1).indices, True)
    return chosen & (scores > -torch.inf)


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: `[B, H, ...]` -> `[B, Hkv, ...]`."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def causal_weights(observation: LayerObservation) -> Tensor:
    """Attention weights of the observation window over all keys, `[B, H, w, L]` float32."""
    batch, heads, width, dim = observation.q.shape
    kv_heads, length = observation.k.shape[1:3]
    q = observation.q.float().view(batch, kv_heads, heads // kv_heads, width, dim)
    scores = q @ observation.k.float()[:, :, None].mT * observation.scale
    device = scores.device
    q_pos = torch.arange(length - width, length, device=device)[:, None]
    masked = torch.arange(length, device=device)[None] > q_pos
    if observation.key_mask is not None:
        masked = masked | ~observation.key_mask[:, :, None, None]
    return scores.masked_fill(masked, -torch.inf).softmax(-1).flatten(1, 2)
