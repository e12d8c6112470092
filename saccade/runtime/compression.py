"""Compression of the caches of a running model by a policy that has observed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    SlidingCache,
    StateCache,
)
from saccade.compress import (
    POLICIES,
    LayerObservation,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.compress.policy import best
from saccade.core import Unsupported
from saccade.runtime.model import ModelCache
from saccade.runtime.observing import ObservationWindow
from saccade.runtime.params import ContextParams

DECODE_ROOM = 64
"""Slots allocated after the kept keys of a prompt, for the tokens that follow."""


def room_behind(params: ContextParams, coming: int = 0) -> int:
    """Slots allocated behind a compression, where `coming` tokens of a prompt are still to come."""
    return (params.kv_every or DECODE_ROOM) + min(coming, params.n_batch)


def wants_ragged(policy_name: str | None) -> bool:
    """Whether a policy lets KV heads keep different numbers of keys."""
    return policy_name is not None and POLICIES[policy_name]().floor is not None


def compress_cache(
    cache: ModelCache,
    window: ObservationWindow,
    budget: int | float,
    *,
    room: int = DECODE_ROOM,
) -> None:
    """Remove keys of every full-attention layer down to the budget; rings and states stay.

    Args:
        window: of the policy, with what it observed.
        budget: keys to keep of each KV head, on average: a number, or as a float a share of the
            tokens that were read.
        room: slots to allocate for what follows.

    Raises:
        Unsupported: a layer cache that cannot remove keys.
    """
    places = _places(cache, window)
    for at, layer in places:
        if not isinstance(layer, RaggedCache | DenseCache | LateQuantizedCache):
            raise Unsupported(
                f"kv_policy needs caches whose keys can be removed, layer {at.layer} has a "
                f"{type(layer).__name__}. Leave out page_size and offload_kqv."
            )
    if window.padding is None and most_above(cache, window, budget) <= 0:
        budget = 1.0  # nothing to remove, so nothing has to be known; quantized all the same
    else:
        window.read_again()
    ragged = [(at, layer) for at, layer in places if isinstance(layer, RaggedCache)]
    if window.policy.across_layers and ragged and budget != 1.0:
        _keep_across_layers(ragged, budget)
        return
    for at, layer in places:
        if isinstance(layer, RaggedCache):
            _keep_by_head(layer, at, budget)
        elif isinstance(layer, DenseCache | LateQuantizedCache):
            _keep_equally(layer, at, budget, room)


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
        if kept >= layer.num_slots:
            return
        view = layer.view()
        index = _selected(at, view.k, view.v, kept)
    elif kept < layer.num_slots or not layer.is_quantized:
        index = _selected(at, *layer.given(), min(kept, layer.num_slots))
    else:
        return
    layer.keep(index, room=room)
    at.window.keep(at.layer, index)


def _selected(at: _Place, k: Tensor, v: Tensor, kept: int) -> Tensor:
    """Slots that stay, int64 `[B, Hkv, kept]`."""
    if kept == k.shape[2]:
        return torch.arange(kept, device=k.device).expand(*k.shape[:2], -1)
    return select(at.window.policy.scores(at.window.of(at.layer, k, v), kept), kept)


def _keep_by_head(layer: RaggedCache, at: _Place, budget: int | float) -> None:
    """Keep the budget on average over the heads, divided among them by their scores."""
    if at.window.padding is None:
        kept = at.kept(budget, layer.seen)
        if kept < int(layer.kv_lens.sum()) // layer.kv_lens.numel():
            observation = at.window.of(at.layer, *layer.gather())
            layer.keep(_chosen(at.window.policy, observation, kept))
        return
    rows = _rows(layer, at, budget)
    length = layer.gather().k.shape[2]
    layer.keep(torch.cat([_chosen_of_row(at, *row, length) for row in rows]))


def _rows(
    layer: RaggedCache, at: _Place, budget: int | float
) -> Iterator[tuple[LayerObservation, int]]:
    """What was observed of each row of a padded batch, and how many keys it keeps."""
    assert at.window.padding is not None
    k, v, positions = layer.gather()
    padding = positions.new_tensor(at.window.padding)[:, None, None]
    whole = at.window.of(at.layer, k, v, positions.where(positions >= padding, -1))
    for row, before in enumerate(at.window.padding):
        yield row_of(whole, row), at.kept(budget, layer.seen - before)


def _chosen(policy: Policy, observation: LayerObservation, kept: int) -> Tensor:
    """Which keys stay, bool `[B, Hkv, L]`."""
    scores = policy.scores(observation, kept)
    if policy.floor is None:
        return best(scores, min(kept, scores.shape[2])) & (scores > -torch.inf)
    return select_across_heads(scores, kept, policy.floor)


def _chosen_of_row(at: _Place, alone: LayerObservation, kept: int, length: int) -> Tensor:
    """Which keys of one row of a padded batch stay, bool `[1, Hkv, length]`."""
    assert alone.positions is not None
    exists = alone.positions >= 0
    if kept >= int(exists.sum(-1).max()):
        chosen = exists
    else:
        chosen = _chosen(at.window.policy, alone, kept)
    return F.pad(chosen, (length - chosen.shape[2], 0))


def _keep_across_layers(ragged: Sequence[tuple[_Place, RaggedCache]], budget: int | float) -> None:
    """Keep the budget on average over the heads of all layers, divided by their scores."""
    every: list[list[Tensor]] = []  # scores of each layer, of each row `[1, Hkv, L]`
    counts: list[int] = []
    policy = ragged[0][0].window.policy
    for at, layer in ragged:
        if at.window.padding is None:
            counts = [at.kept(budget, layer.seen)] * layer.kv_lens.shape[0]
            scores = policy.scores(at.window.of(at.layer, *layer.gather()), counts[0])
            every.append(list(scores.split(1)))
            continue
        rows = list(_rows(layer, at, budget))
        counts = [kept for _, kept in rows]
        every.append([policy.scores(alone, kept) for alone, kept in rows])
    chosen = [
        _split_over_layers([scores[row] for scores in every], kept, policy.floor or 0.0)
        for row, kept in enumerate(counts)
    ]
    for (_, layer), *parts in zip(ragged, *chosen, strict=True):
        length = layer.gather().k.shape[2]
        layer.keep(torch.cat([F.pad(part, (length - part.shape[2], 0)) for part in parts]))


def _split_over_layers(scores: Sequence[Tensor], kept: int, floor: float) -> list[Tensor]:
    """Which keys of each layer stay, bool `[1, Hkv, L]`, where all heads share one budget."""
    most = max(each.shape[2] for each in scores)
    heads = [F.pad(each, (most - each.shape[2], 0), value=-torch.inf) for each in scores]
    chosen = select_across_heads(torch.cat(heads, dim=1), kept, floor)
    parts = chosen.split([each.shape[1] for each in scores], dim=1)
    return [x[..., most - each.shape[2] :] for x, each in zip(parts, scores, strict=True)]


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
    expected, received = whole.expected, whole.received
    return replace(
        whole,
        queries=queries,
        k=whole.k[row : row + 1, :, first:],
        v=whole.v[row : row + 1, :, first:],
        positions=positions[..., first:],
        expected=expected and type(expected)(*(x[row : row + 1] for x in expected)),
        received=None if received is None else received[row : row + 1, :, first:],
    )
