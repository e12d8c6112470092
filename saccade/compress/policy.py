"""What all policies share: scores for the keys of a layer, and the selection by budget."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes

SINKS = 4
"""First keys that stay: models rest attention on them (StreamingLLM, arXiv 2309.17453)."""


class Policy(ABC):
    """Scores every key of every KV head; the cache keeps those with the highest scores.

    Attributes:
        floor: share of the budget that every head keeps, None where all heads keep equally many.
            Under a share, the heads of a layer compete for the rest (`select_across_heads`), which
            needs a ragged cache.
        across_layers: whether the heads of all layers compete, instead of those of each layer.
    """

    __slots__ = ()

    floor: float | None = None
    across_layers: bool = False

    @property
    def observes(self) -> Observes:
        """What it has to see beside keys and values."""
        return Observes()

    @property
    def least(self) -> int:
        """Keys of a head that it always keeps where the budget allows: sinks, newest queries."""
        return getattr(self, "sinks", 0) + self.observes.queries

    def layer_budget(self, kept: int, length: int, layer: int, layers: int) -> int:
        """Keys that a head of one of `layers` layers keeps of `length`, `kept` on average."""
        del length, layer, layers  # equally many in all layers
        return kept

    @abstractmethod
    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance of each key, `[B, Hkv, L]`; +inf for keys that must stay, -inf for no key.

        Args:
            kept: keys that a head keeps, on average; at most so many scores a head are +inf, on
                average over the heads.
        """


def select(scores: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` highest scores of each KV head, ascending, int64 `[B, Hkv, kept]`.

    Of equal scores the earlier key stays, so a larger budget keeps what a smaller one keeps.
    """
    # Ascending indices keep the order of positions, which causal attention over slots relies on.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def best(scores: Tensor, kept: int) -> Tensor:
    """`select` as bool `[B, Hkv, L]`."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, select(scores, kept), True)


def guaranteed(floor: float, kept: int) -> int:
    """Keys that each head keeps under a floor."""
    return max(1, round(floor * kept))


def select_across_heads(scores: Tensor, kept: int, floor: float) -> Tensor:
    """The highest scores of a layer, whichever heads they belong to (Ada-KV, arXiv 2407.11550).

    Each head keeps its own `floor * kept` best keys, one at least; the best keys of all heads fill
    the rest.

    Args:
        scores: `[B, Hkv, L]`, -inf where there is no key; the heads may be those of many layers.
        kept: keys of a head on average.
        floor: share of `kept` that every head keeps, 0 to 1.

    Returns:
        bool `[B, Hkv, L]` with `kept * Hkv` True a row, or as many as there are keys.
    """
    heads, length = scores.shape[1:]
    exists = scores > -torch.inf
    own = best(scores, min(length, guaranteed(floor, kept)))
    ranked = scores.masked_fill(own & exists, torch.inf).flatten(1)
    highest = ranked.argsort(dim=-1, descending=True, stable=True)[:, : kept * heads]
    chosen = torch.zeros_like(exists.flatten(1)).scatter_(-1, highest, True)
    return chosen.view_as(exists) & exists


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: `[B, H, ...]` -> `[B, Hkv, ...]`."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)
