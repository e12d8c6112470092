"""Compression of the caches of a running model: observe its queries, then apply a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache import (
    DenseCache,
    LateQuantizedCache,
    LayerCache,
    RaggedCache,
    ShiftKeys,
    SlidingCache,
    StateCache,
)
from saccade.compress import (
    POLICIES,
    ExpectedQueries,
    LayerObservation,
    ObservedQueries,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.compress.policy import best
from saccade.compress.query_statistics import expected_queries, with_statistics
from saccade.core import Unsupported
from saccade.ops import AttentionCall
from saccade.runtime.model import ModelCache

DECODE_ROOM = 64
"""Slots allocated after the kept keys of a prompt, for the tokens that follow."""


class Sources(NamedTuple):
    """What a policy may ask of the model beside what its attention computes.

    Attributes:
        shift_keys: layer -> what moves its keys by positions; see `runtime.model.Model`.
        output_weights: layer -> its output projection `[H, Dv, hidden]`.
    """

    shift_keys: Callable[[int], ShiftKeys]
    output_weights: Callable[[int], Tensor]


class ObservationWindow:
    """What a policy has to see of every layer, kept while a prompt is read.

    Args:
        policy: it says how many of the newest queries (SnapKV, arXiv 2404.14469), and what else.
        cache: the caches that are observed.
        sources: of the model.
        padding: tokens before the text of each row of a batch; None: none.
    """

    def __init__(
        self,
        policy: Policy,
        cache: ModelCache,
        sources: Sources,
        padding: Sequence[int] | None = None,
    ) -> None:
        self.policy, self.padding = policy, padding
        self._cache, self._sources = cache, sources
        self._observed: dict[int, ObservedQueries] = {}
        check_rotation(policy, sources.shift_keys)

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
        width = max(1, self.policy.observes.queries)
        newest, older = _newest_queries(call, width), self._observed.get(layer)
        if older is not None and newest.q.shape[2] < width:
            newest = _joined(older, newest, width)
        if self.policy.observes.future:
            rotate = self._sources.shift_keys(layer)
            newest = with_statistics(older, newest, call.q, self._positions(layer, call), rotate)
        self._observed[layer] = newest

    def _positions(self, layer: int, call: AttentionCall) -> Tensor:
        """Positions of the queries of a call, which were stored last: `[1 | B, t]`."""
        seen, count = self._cache.stores[layer].seen, call.q.shape[2]
        at = torch.arange(seen - count, seen, device=call.q.device)[None]
        return at if self.padding is None else at - at.new_tensor(self.padding)[:, None]

    def state(self) -> dict[int, ObservedQueries]:
        """What was observed of each layer so far."""
        return dict(self._observed)

    def after_compression(self) -> dict[int, ObservedQueries] | None:
        """What goes on being observed when keys were removed; None: nothing.

        Of the window the newest query alone: keys of the others may be gone, so that nothing says
        any more which of the keys they see.  Blocks that it has read are counted in keys, of which
        there are others now.
        """
        if any(each.blocks is not None for each in self._observed.values()):
            return None
        return {i: each._replace(q=each.q[:, :, -1:]) for i, each in self._observed.items()}

    def restore(self, state: dict[int, ObservedQueries]) -> None:
        """Replace everything observed by a `state`."""
        self._observed = dict(state)

    def of(
        self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> LayerObservation:
        """What was observed of a layer that holds these keys; see LayerObservation."""
        found, observes = self._observed[layer], self.policy.observes
        observation = LayerObservation(queries=found, k=k, v=v, positions=positions)
        if observes.output:
            output = self._sources.output_weights(layer)
            observation = replace(observation, output=output)
        if observes.future:
            observation = replace(observation, expected=self._expected(layer))
        return observation

    def _expected(self, layer: int) -> ExpectedQueries:
        """Queries to come of a layer, behind the text of each row."""
        found, seen = self._observed[layer], self._cache.stores[layer].seen
        rotate, future = self._sources.shift_keys(layer), self.policy.observes.future
        if self.padding is None:
            return expected_queries(found, rotate, seen, future)
        rows = [expected_queries(found, rotate, seen - n, future) for n in self.padding]
        parts = zip(*(tuple(x[b : b + 1] for x in row) for b, row in enumerate(rows)), strict=True)
        return ExpectedQueries(*(torch.cat(part) for part in parts))


def observing(
    policy: str, cache: ModelCache, sources: Sources, padding: Sequence[int] | None = None
) -> ObservationWindow:
    """A window of the policy of that name, which observes a cache from here on."""
    window = ObservationWindow(POLICIES[policy](), cache, sources, padding)
    cache.observer = window.observe
    return window


def check_rotation(policy: Policy, shift_keys: Callable[[int], ShiftKeys]) -> None:
    """Find how keys rotate, before the model runs: observing happens inside of it.

    Raises:
        Unsupported: it is not known, and the policy needs it.
    """
    if not policy.observes.future:
        return
    try:
        shift_keys(0)
    except Unsupported as error:
        raise Unsupported(
            f"ExpectedAttention has to undo RoPE, which is not known here ({error}) Choose another "
            "kv_policy, such as 'snapkv'."
        ) from error


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
    cache: ModelCache,
    window: ObservationWindow,
    budget: int | float,
    *,
    room: int | None = None,
) -> None:
    """Remove keys of every full-attention layer down to the budget; rings and states stay.

    Args:
        window: of the policy, with what it observed.
        budget: keys to keep of each KV head, on average: a number, or as a float a share of the
            tokens that were read.
        room: slots to allocate for what follows; default DECODE_ROOM.

    Raises:
        Unsupported: a layer cache that cannot remove keys.
    """
    for at, layer in _places(cache, window):
        if isinstance(layer, RaggedCache):
            _keep_by_head(layer, at, budget)
        elif isinstance(layer, DenseCache | LateQuantizedCache):
            _keep_equally(layer, at, budget, DECODE_ROOM if room is None else room)
        else:
            raise Unsupported(
                f"kv_policy needs caches whose keys can be removed, layer {at.layer} has a "
                f"{type(layer).__name__}. Leave out page_size and offload_kqv."
            )


def most_above(cache: ModelCache, window: ObservationWindow, budget: int | float) -> int:
    """By how many keys of a head the layer that is farthest above its budget is above it."""
    above = [0]
    for at, layer in _places(cache, window):
        if isinstance(layer, RaggedCache):
            above.append(int(layer.kv_lens.sum()) // layer.kv_lens.numel())
        elif isinstance(layer, DenseCache | LateQuantizedCache):
            above.append(layer.num_slots)
        above[-1] -= at.kept(budget, layer.seen)
    return max(above)


def _places(cache: ModelCache, window: ObservationWindow) -> list[tuple[_Place, LayerCache]]:
    """The layers that a policy makes smaller."""
    full = [
        (i, store)
        for i, store in enumerate(cache.stores)
        if not isinstance(store, SlidingCache | StateCache)
    ]
    return [(_Place(window, i, rank, len(full)), s) for rank, (i, s) in enumerate(full)]


class _Place(NamedTuple):
    """A layer among those that are compressed."""

    window: ObservationWindow
    layer: int
    rank: int
    layers: int

    def kept(self, budget: int | float, seen: int) -> int:
        """Keys of a head to keep of a text of `seen` tokens."""
        mean = resolve_budget(budget, seen)
        return self.window.policy.layer_budget(mean, seen, self.rank, self.layers)


def _keep_equally(
    layer: DenseCache | LateQuantizedCache, at: _Place, budget: int | float, room: int
) -> None:
    """Keep the same number of keys of every head; quantize what is to be quantized."""
    kept = at.kept(budget, layer.seen)
    if isinstance(layer, DenseCache):
        if kept < layer.num_slots:
            view = layer.view()
            layer.keep(_selected(at, view.k, view.v, kept), room=room)
        return
    if kept < layer.num_slots or not layer.is_quantized:
        layer.keep(_selected(at, *layer.given(), min(kept, layer.num_slots)), room=room)


def _selected(at: _Place, k: Tensor, v: Tensor, kept: int) -> Tensor:
    """Slots that stay, int64 `[B, Hkv, kept]`."""
    if kept == k.shape[2]:
        return torch.arange(kept, device=k.device).expand(*k.shape[:2], -1)
    return select(at.window.policy.scores(at.window.of(at.layer, k, v), kept), kept)


def _keep_by_head(layer: RaggedCache, at: _Place, budget: int | float) -> None:
    """Keep the budget on average over the heads, divided among them by their scores."""
    padding = at.window.padding
    if padding is None:
        kept = at.kept(budget, layer.seen)
        if kept < int(layer.kv_lens.sum()) // layer.kv_lens.numel():
            k, v, positions = layer.gather()
            layer.keep(_chosen(at.window.policy, at.window.of(at.layer, k, v, positions), kept))
        return
    k, v, positions = layer.gather()
    positions = positions.where(positions >= positions.new_tensor(padding)[:, None, None], -1)
    whole = at.window.of(at.layer, k, v, positions)
    counts = [at.kept(budget, layer.seen - before) for before in padding]
    layer.keep(torch.cat([_chosen_of_row(at, whole, b, kept) for b, kept in enumerate(counts)]))


def _chosen(policy: Policy, observation: LayerObservation, kept: int) -> Tensor:
    """Which keys stay, bool `[B, Hkv, L]`."""
    scores = policy.scores(observation, kept)
    if policy.floor is None:
        return best(scores, min(kept, scores.shape[2])) & (scores > -torch.inf)
    return select_across_heads(scores, kept, policy.floor)


def _chosen_of_row(at: _Place, whole: LayerObservation, row: int, kept: int) -> Tensor:
    """Which keys of one row of a padded batch stay, bool `[1, Hkv, L]`."""
    alone = row_of(whole, row)
    assert alone.positions is not None
    exists = alone.positions >= 0
    if kept >= int(exists.sum(-1).max()):
        chosen = exists
    else:
        chosen = _chosen(at.window.policy, alone, kept)
    return F.pad(chosen, (whole.k.shape[2] - chosen.shape[2], 0))


def row_of(whole: LayerObservation, row: int) -> LayerObservation:
    """What was observed of one row of a batch, without the columns where it has no keys."""
    assert whole.positions is not None
    positions = whole.positions[row : row + 1]
    first = int((positions >= 0).any(1).int().argmax())
    own = {
        name: x[row : row + 1]
        for name, x in whole.queries._asdict().items()
        if isinstance(x, Tensor) and name != "sink_logits" and x.shape[0] > 1
    }
    queries = whole.queries._replace(**own)
    width = min(queries.q.shape[2], positions.shape[2] - first)
    blocks = None if queries.blocks is None else queries.blocks[:, :, -width:]
    queries = queries._replace(q=queries.q[:, :, -width:], blocks=blocks)
    expected = whole.expected
    return replace(
        whole,
        queries=queries,
        k=whole.k[row : row + 1, :, first:],
        v=whole.v[row : row + 1, :, first:],
        positions=positions[..., first:],
        expected=expected and type(expected)(*(x[row : row + 1] for x in expected)),
    )
