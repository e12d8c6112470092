"""Compression of the caches of a running model: observe the last queries, then apply a policy."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache import DenseCache, LayerCache, RaggedCache, RingCache, StateCache
from saccade.compress import (
    POLICIES,
    LayerObservation,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.core import KVView, Unsupported
from saccade.runtime.model import ModelCache

DECODE_ROOM = 64
"""Slots allocated after the kept keys of a prompt, for the tokens that follow."""


class ObservationWindow:
    """The newest queries of every layer, kept while a prompt is read (SnapKV, arXiv 2404.14469).

    Args:
        width: how many queries of each layer to keep.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._observed: dict[int, tuple[Tensor, float]] = {}

    @classmethod
    def for_policy(cls, name: str) -> ObservationWindow:
        """A window as wide as the policy of that name needs."""
        return cls(POLICIES[name]().num_queries)

    def observe(self, layer: int, q: Tensor, kv: KVView, lse: Tensor, scale: float) -> None:
        """Add the queries `[B, H, t, D]` of one layer; see `runtime.model.Observer`."""
        newest = q[:, :, -self._width :]
        if layer in self._observed and newest.shape[2] < self._width:
            newest = torch.cat((self._observed[layer][0], newest), dim=2)[:, :, -self._width :]
        self._observed[layer] = newest.clone(), scale

    def state(self) -> dict[int, tuple[Tensor, float]]:
        """Queries `[B, H, w, D]` and softmax scale of each layer observed so far."""
        return dict(self._observed)

    def restore(self, state: dict[int, tuple[Tensor, float]]) -> None:
        """Replace everything observed by a `state`."""
        self._observed = dict(state)

    def of(self, layer: int) -> tuple[Tensor, float]:
        """Queries `[B, H, w, D]` and softmax scale of a layer."""
        return self._observed[layer]


def wants_ragged(policy_name: str | None) -> bool:
    """Whether a policy lets KV heads keep different numbers of keys."""
    return policy_name is not None and POLICIES[policy_name]().floor is not None


def compress_cache(
    cache: ModelCache, window: ObservationWindow, policy_name: str, budget: int | float
) -> None:
    """Remove keys of every full-attention layer down to the budget; rings and states stay.

    Args:
        budget: keys to keep of each KV head, on average: a number, or a share as a float.

    Raises:
        Unsupported: a layer cache that cannot remove keys.
    """
    policy = POLICIES[policy_name]()
    for i, layer in enumerate(cache.stores):
        if isinstance(layer, RingCache | StateCache):
            continue
        if isinstance(layer, RaggedCache):
            _keep_by_head(layer, policy, budget, *window.of(i))
        elif isinstance(layer, DenseCache):
            _keep_equally(layer, policy, budget, *window.of(i))
        else:
            raise Unsupported(
                f"kv_policy needs caches in full precision, layer {i} has a "
                f"{type(layer).__name__}. Leave out type_k, type_v, page_size and offload_kqv."
            )


def _keep_equally(
    layer: DenseCache, policy: Policy, budget: int | float, q: Tensor, scale: float
) -> None:
    """Keep the same number of keys of every head."""
    view = layer.view()
    kept = resolve_budget(budget, layer.num_slots)
    if kept < layer.num_slots:
        scores = policy.scores(LayerObservation(q=q, k=view.k, v=view.v, scale=scale))
        layer.keep(select(scores, kept), room=DECODE_ROOM)


def _keep_by_head(
    layer: RaggedCache, policy: Policy, budget: int | float, q: Tensor, scale: float
) -> None:
    """Keep the budget on average over the heads, divided among them by their scores."""
    kv_lens = layer.kv_lens
    mean = int(kv_lens.sum()) // kv_lens.numel()
    kept = resolve_budget(budget, mean)
    if kept < mean:
        k, v, positions = layer.gather()
        observation = LayerObservation(q=q, k=k, v=v, scale=scale, key_mask=positions >= 0)
        scores = policy.scores(observation)
        layer.keep(select_across_heads(scores, kept, policy.floor or 0.0))


def compress_without_data(cache: LayerCache, budget: int | float) -> None:
    """`compress_cache` for a plan: the tensors of the cache have shapes and no contents.

    Heads that compete for a budget are assumed to keep equally many keys.
    """
    if isinstance(cache, DenseCache):
        kept = resolve_budget(budget, cache.num_slots)
        if kept < cache.num_slots:
            view = cache.view()
            index = torch.zeros(*view.shape[:2], kept, dtype=torch.int64, device=view.device)
            cache.keep(index, room=DECODE_ROOM)
    elif isinstance(cache, RaggedCache):
        kept = resolve_budget(budget, cache.seen)
        if kept < cache.seen:
            cache.keep_newest(kept)
