"""KV-level compression of a running model: watch the last queries, then let a policy choose."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache import DenseCache, LayerCache, RaggedCache, RingCache
from saccade.compress import (
    POLICIES,
    Observed,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.core import KVView, Unsupported
from saccade.runtime.model import ModelCache

DECODE_ROOM = 64
"""Slots left behind a compressed prompt for the answer."""


class QueryTail:
    """Remembers the newest queries of every layer while a prompt is read.

    Args:
        width: how many queries to remember.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._queries: dict[int, Tensor] = {}
        self._scales: dict[int, float] = {}

    @classmethod
    def for_policy(cls, name: str) -> QueryTail:
        """A tail as long as the policy of that name wants."""
        return cls(POLICIES[name]().num_queries)

    def observe(self, layer: int, q: Tensor, kv: KVView, lse: Tensor, scale: float) -> None:
        """Take in the queries `[B, H, t, D]` of one step."""
        newest = q[:, :, -self._width :]
        if layer in self._queries and newest.shape[2] < self._width:
            newest = torch.cat((self._queries[layer], newest), dim=2)[:, :, -self._width :]
        self._queries[layer] = newest.clone()
        self._scales[layer] = scale

    def state(self) -> dict[int, tuple[Tensor, float]]:
        """Queries and softmax scale of each layer seen so far."""
        return {layer: (q, self._scales[layer]) for layer, q in self._queries.items()}

    def restore(self, state: dict[int, tuple[Tensor, float]]) -> None:
        """Remember what `state` says and nothing else."""
        self._queries = {layer: q for layer, (q, _) in state.items()}
        self._scales = {layer: scale for layer, (_, scale) in state.items()}

    def of(self, layer: int) -> tuple[Tensor, float]:
        """Queries and softmax scale of a layer."""
        return self._queries[layer], self._scales[layer]


def wants_ragged(policy_name: str | None) -> bool:
    """Whether a policy lets KV heads keep different numbers of keys."""
    return policy_name is not None and POLICIES[policy_name]().floor is not None


def compress_cache(
    cache: ModelCache, tail: QueryTail, policy_name: str, budget: int | float
) -> None:
    """Shrink every full-length layer cache to the budget; sliding layers are small already.

    Raises:
        Unsupported: a layer cache that cannot drop keys.
    """
    policy = POLICIES[policy_name]()
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, RingCache):
            continue
        if isinstance(layer, RaggedCache):
            _keep_by_head(layer, policy, budget, *tail.of(i))
        elif isinstance(layer, DenseCache):
            _keep_equally(layer, policy, budget, *tail.of(i))
        else:
            raise Unsupported(
                f"kv_policy needs caches in full precision, layer {i} has {type(layer).__name__}."
            )


def _keep_equally(
    layer: DenseCache, policy: Policy, budget: int | float, q: Tensor, scale: float
) -> None:
    view = layer.view()
    kept = resolve_budget(budget, layer.num_slots)
    if kept < layer.num_slots:
        scores = policy.scores(Observed(q=q, k=view.k, v=view.v, scale=scale))
        layer.keep(select(scores, kept), room=DECODE_ROOM)


def _keep_by_head(
    layer: RaggedCache, policy: Policy, budget: int | float, q: Tensor, scale: float
) -> None:
    """The budget is that of a head on average; heads of a layer share it as their scores say."""
    kv_lens = layer.kv_lens
    mean = int(kv_lens.sum()) // kv_lens.numel()
    kept = resolve_budget(budget, mean)
    if kept < mean:
        held = layer.held()
        real = held.positions >= 0
        seen = Observed(q=q, k=held.k, v=held.v, scale=scale, real=real)
        layer.keep(select_across_heads(policy.scores(seen), kept, policy.floor or 0.0))


def shrink_without_numbers(cache: LayerCache, budget: int | float) -> None:
    """What `compress_cache` leaves of a layer whose tensors have shapes and no contents.

    Heads that compete for a budget are taken to keep equally many keys.
    """
    if isinstance(cache, DenseCache):
        kept = resolve_budget(budget, cache.num_slots)
        if kept < cache.num_slots:
            view = cache.view()
            some = torch.zeros(*view.shape[:2], kept, dtype=torch.int64, device=view.device)
            cache.keep(some, room=DECODE_ROOM)
    elif isinstance(cache, RaggedCache):
        kept = resolve_budget(budget, cache.seen)
        if kept < cache.seen:
            cache.keep_newest(kept)
