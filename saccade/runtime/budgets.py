"""Budgets of a model: the keys that each layer keeps, and a budget in bytes as a number of keys."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from typing import Final

from saccade.cache import SlidingCache
from saccade.compress import POLICIES, in_keys, resolve_budget
from saccade.core import BadInput
from saccade.core.check import LARGEST_POSITION
from saccade.runtime.compression import room_behind
from saccade.runtime.layers import layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.planned_cache import MetaCache, planned_cache
from saccade.units import Bytes, as_bytes

MOST_KEYS: Final = 1 << 27
"""More keys of a head than any context has; a larger budget keeps them all."""


def kept_of_layers(facts: ModelFacts, params: ContextParams, seen: int) -> list[int | None]:
    """Keys of a head that each layer keeps of `seen` tokens; None for one that no policy changes.

    Heads may divide those of their layer, or of all layers, by their scores.
    """
    if params.kv_policy is None or params.kv_budget is None:
        return [None] * len(facts.windows)
    mean = resolve_budget(in_keys(params.kv_budget), seen)
    policy, ranks = POLICIES[params.kv_policy](), _ranks(facts, params)
    layers = len(facts.windows) - ranks.count(None)
    return [None if at is None else policy.layer_budget(mean, seen, at, layers) for at in ranks]


def _ranks(facts: ModelFacts, params: ContextParams) -> list[int | None]:
    """The place of each layer among those that a policy makes smaller; rings have none."""
    ranks: list[int | None] = []
    for own in facts.windows:
        is_ring = isinstance(layer_cache(own, params), SlidingCache)
        ranks.append(None if is_ring else len(ranks) - ranks.count(None))
    return ranks


def budget_in_keys(
    params: ContextParams, facts: ModelFacts, *, rows: int = 1, ragged: bool = False
) -> ContextParams:
    """The same options with a `kv_budget` in bytes as the most keys of a head that fit into it.

    The caches of all layers then take at most these bytes behind a compression: rings, states and
    the room allocated for tokens that follow are counted, under `kv_every` all tokens until the
    next compression (but for the chunk of a prompt that is being read); of a quantized cache the
    newest tokens, as many in 16 bits as it may have; where heads share a budget, the worst
    division of keys among pages.  A text of fewer keys is not compressed: it takes what its caches
    have grown to, a sixteenth more than its keys at most.

    Args:
        rows: of a batch, which share the bytes equally.
        ragged: whether every layer's cache is, as those of padded batches are.

    Raises:
        BadInput: fewer bytes than are needed for the keys that the policy always keeps.
    """
    budget = params.kv_budget
    if not isinstance(budget, Bytes):
        return params
    assert params.kv_policy is not None
    least, caches = POLICIES[params.kv_policy]().least, _Compressed(facts, params, ragged)
    needed = rows * caches.most_bytes(least)
    if needed > budget.count:
        raise BadInput(
            f"kv_budget={budget} is too small: behind a compression the caches of this model take "
            f"{as_bytes(needed)} with the {least} keys that kv_policy={params.kv_policy!r} always "
            f"keeps of a head. Give at least {Bytes(f'{-(-needed // 1024)}KiB')}."
        )
    per_row, most = budget.count // rows, 2 * least
    while most < MOST_KEYS and caches.most_bytes(most) <= per_row:
        most *= 2
    counts = range(least, min(most, MOST_KEYS) + 1)
    kept = bisect_right(counts, per_row, key=caches.most_bytes)
    return replace(params, kv_budget=counts[kept - 1])


class _Compressed:
    """The caches of one row behind a compression."""

    def __init__(self, facts: ModelFacts, params: ContextParams, ragged: bool) -> None:
        assert params.kv_policy is not None
        self._policy = POLICIES[params.kv_policy]()
        self._room, self._every = room_behind(params), params.kv_every or 0
        ranks, layers = _ranks(facts, params), facts.layers()
        self._fixed = facts.state_bytes + sum(
            count * _ring_bytes(layer, params) for layer, count in
            Counter(x for x, at in zip(layers, ranks, strict=True) if at is None).items()
        )  # fmt: skip
        self._layers = [x for x, at in zip(layers, ranks, strict=True) if at is not None]
        if self._policy.across_layers:  # the largest layer may keep most keys
            self._layers = _largest(self._layers)
        self._caches: dict[ModelFacts, MetaCache] = {}
        for layer in set(self._layers):
            cache = MetaCache(layer_cache(layer.windows[0], params, ragged=ragged), layer)
            cache.run(1, 1)
            self._caches[layer] = cache

    def most_bytes(self, kept: int) -> int:
        """Bytes of all layers at most, with `kept` keys of a head on average.

        Layers keep equally many of a short text, the most unequal numbers of a long one.
        """
        return self._fixed + max(self._of_text(kept, n) for n in (kept, LARGEST_POSITION))

    def _of_text(self, kept: int, length: int) -> int:
        count = len(self._layers)
        budgets = (self._policy.layer_budget(kept, length, i, count) for i in range(count))
        alike = Counter(zip(self._layers, budgets, strict=True))
        return sum(
            times * self._caches[layer].most_bytes(n, self._room, self._every)
            for (layer, n), times in alike.items()
        )


def _largest(layers: list[ModelFacts]) -> list[ModelFacts]:
    """Layers as large as the largest in heads and widths."""
    if len(set(layers)) < 2:
        return layers
    sizes = {
        "num_kv_heads": max(each.num_kv_heads for each in layers),
        "head_dim": max(each.head_dim for each in layers),
        "value_dim": max(each.value_dim or each.head_dim for each in layers),
    }
    return [replace(layers[0], **sizes)] * len(layers)  # type: ignore[arg-type]


def _ring_bytes(layer: ModelFacts, params: ContextParams) -> int:
    """Bytes of the cache of a layer with a window, behind a text that is longer than it."""
    own = layer.windows[0]
    window = narrowed_window(own, params)[0] or own
    assert window is not None, "other layers are compressed"
    size = min(params.n_batch, window)
    ring = planned_cache(layer_cache(own, params), layer)
    ring.run(size, -(-window // size) + params.ctx_checkpoints + 2)
    return ring.nbytes
