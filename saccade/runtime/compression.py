"""Compression of the caches of a running model: observe the last queries, then apply a policy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache import DenseCache, RaggedCache, SlidingCache, StateCache
from saccade.compress import (
    POLICIES,
    LayerObservation,
    ObservedQueries,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.core import Unsupported
from saccade.ops import AttentionCall
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
        self._observed: dict[int, ObservedQueries] = {}

    @classmethod
    def for_policy(cls, name: str) -> ObservationWindow:
        """A window as wide as the policy of that name needs."""
        return cls(POLICIES[name]().num_queries)

    def observe(self, layer: int, call: AttentionCall, lse: Tensor) -> None:
        """Add the queries of one call of one layer; see `runtime.model.Observer`.

        Raises:
            Unsupported: attention that depends on distances, which a compressed cache changes.
        """
        if call.alibi_slopes is not None:
            raise Unsupported(
                "kv_policy removes keys, and ALiBi weighs keys by how many lie between. Leave out "
                "kv_policy for this model."
            )
        newest = _newest_queries(call, self._width)
        older = self._observed.get(layer)
        if older is not None and newest.q.shape[2] < self._width:
            newest = _joined(older, newest, self._width)
        self._observed[layer] = newest

    def state(self) -> dict[int, ObservedQueries]:
        """What was observed of each layer so far."""
        return dict(self._observed)

    def restore(self, state: dict[int, ObservedQueries]) -> None:
        """Replace everything observed by a `state`."""
        self._observed = dict(state)

    def of(self, layer: int) -> ObservedQueries:
        """The newest queries of a layer."""
        return self._observed[layer]


def _newest_queries(call: AttentionCall, width: int) -> ObservedQueries:
    """The last `width` queries of a call, copied, and the blocks of keys that each of them read."""
    length = call.q.shape[2]
    blocks = None
    if call.blocks is not None:
        index = torch.arange(max(0, length - width), length, device=call.q.device)
        blocks = call.blocks.allowed[:, :, index // call.blocks.q_block]
    return ObservedQueries(
        q=call.q[:, :, -width:].detach().clone(),
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=None if call.sink_logits is None else call.sink_logits.detach(),
        blocks=blocks,
        k_block=0 if call.blocks is None else call.blocks.k_block,
    )


def _joined(older: ObservedQueries, newer: ObservedQueries, width: int) -> ObservedQueries:
    """The newest `width` of the queries of two calls; earlier queries read no later block."""
    blocks = None
    if older.blocks is not None and newer.blocks is not None:
        missing = newer.blocks.shape[3] - older.blocks.shape[3]
        padded = F.pad(older.blocks, (0, missing))
        blocks = torch.cat((padded, newer.blocks), dim=2)[:, :, -width:]
    q = torch.cat((older.q, newer.q), dim=2)[:, :, -width:]
    return newer._replace(q=q, blocks=blocks)


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
        if isinstance(layer, SlidingCache | StateCache):
            continue
        if isinstance(layer, RaggedCache):
            _keep_by_head(layer, policy, budget, window.of(i))
        elif isinstance(layer, DenseCache):
            _keep_equally(layer, policy, budget, window.of(i))
        else:
            raise Unsupported(
                f"kv_policy needs caches in full precision, layer {i} has a "
                f"{type(layer).__name__}. Leave out type_k, type_v, page_size and offload_kqv."
            )


def _keep_equally(
    layer: DenseCache, policy: Policy, budget: int | float, queries: ObservedQueries
) -> None:
    """Keep the same number of keys of every head."""
    view = layer.view()
    kept = resolve_budget(budget, layer.num_slots)
    if kept < layer.num_slots:
        observation = LayerObservation(queries=queries, k=view.k, v=view.v)
        layer.keep(select(policy.scores(observation, kept), kept), room=DECODE_ROOM)


def _keep_by_head(
    layer: RaggedCache, policy: Policy, budget: int | float, queries: ObservedQueries
) -> None:
    """Keep the budget on average over the heads, divided among them by their scores."""
    kv_lens = layer.kv_lens
    mean = int(kv_lens.sum()) // kv_lens.numel()
    kept = resolve_budget(budget, mean)
    if kept < mean:
        k, v, positions = layer.gather()
        observation = LayerObservation(queries=queries, k=k, v=v, positions=positions)
        scores = policy.scores(observation, kept)
        layer.keep(select_across_heads(scores, kept, policy.floor or 0.0))
