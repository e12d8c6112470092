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
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Policy(Protocol):
    """Scores every key of every KV head; the best ones stay.

    Attributes:
        num_queries: how many of the newest queries the policy wants to see.
    """

    @property
    def num_queries(self) -> int: ...

    def scores(self, observed: Observed) -> Tensor:
        """Importance of each key, `[B, Hkv, L]`; +inf for keys that must stay."""
        ...


def resolve_budget(budget: int | float, length: int) -> int:
    """Keys to keep of `length`: an int is a number of keys, a float a share of them."""
    kept = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(kept, length))


def select(scores: Tensor, kept: int) -> Tensor:
    """The `kept` best keys of each KV head in their original order, int64 `[B, Hkv, kept]`."""
    # Sorting by index afterwards keeps position order, which rings and context shifts rely on.
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values


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
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).flatten(1, 2)
