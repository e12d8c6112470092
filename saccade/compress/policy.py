"""The protocol of cache policies: scores for the keys of a layer, and the selection by budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.compress.received import attention_weights
from saccade.core import DenseKV, Mask
from saccade.core.kv import dense
from saccade.ops import AttentionCall, attend, make_call


class ObservedQueries(NamedTuple):
    """The newest w queries of a layer and how it weighs its keys.

    Attributes:
        q: `[B, H, w, D]`, after RoPE.
        scale, softcap, sink_logits: of the layer's attention; see `saccade.attention`.
        blocks: bool `[B | 1, Hkv | 1, w, num_blocks]`, the blocks of keys that each query read
            under a sparse pattern; None for all.
        k_block: keys a block holds, 0 without blocks.
    """

    q: Tensor
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    blocks: Tensor | None = None
    k_block: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """What a policy scores the keys of one layer by, after the prompt.

    Attributes:
        queries: of the observation window, the newest w tokens.
        k: all keys `[B, Hkv, L, D]`, the newest last; v: all values `[B, Hkv, L, Dv]`.
        positions: int64 `[B, Hkv, L]`, ascending, -1 (on the left) where a head has no key, for
            heads with fewer keys than others; None: key i is at position i.
    """

    queries: ObservedQueries
    k: Tensor
    v: Tensor
    positions: Tensor | None = None

    @property
    def key_mask(self) -> Tensor | None:
        """bool `[B, Hkv, L]`, True where a head has a key; None: everywhere."""
        return None if self.positions is None else self.positions >= 0


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

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance of each key, `[B, Hkv, L]`; +inf for keys that must stay, -inf for no key.

        Args:
            kept: keys that a head keeps, on average; at most so many scores of a head are +inf.
        """
        ...


def resolve_budget(budget: int | float, length: int) -> int:
    """Keys to keep of `length`, 1 to `length`: an int is a number of keys, a float a share."""
    kept = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(kept, length))


def select(scores: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` highest scores of each KV head, ascending, int64 `[B, Hkv, kept]`.

    Of equal scores the earlier key stays, so a larger budget keeps what a smaller one keeps.
    """
    # Ascending indices keep the order of positions, which causal attention over slots relies on.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


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
    exists = scores > -torch.inf
    guaranteed = min(length, max(1, round(floor * kept)))
    own = torch.zeros_like(exists).scatter_(-1, select(scores, guaranteed), True)
    ranked = scores.masked_fill(own & exists, torch.inf).flatten(1)
    best = ranked.argsort(dim=-1, descending=True, stable=True)[:, : kept * heads]
    chosen = torch.zeros_like(exists.flatten(1)).scatter_(-1, best, True)
    return chosen.view_as(exists) & exists


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: `[B, H, ...]` -> `[B, Hkv, ...]`."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def observed_weights(observation: LayerObservation) -> Tensor:
    """Attention weights of the observation window over all keys, `[B, H, w, L]` float32.

    They are those of the layer's own attention: causal, with its softcap, its learned sinks and
    its block selection.
    """
    call = _call(observation)
    lse = attend(call, backend="tiled").lse
    return attention_weights(call, dense(call.kv), lse).flatten(1, 2)


def _call(observation: LayerObservation) -> AttentionCall:
    """The attention of the observed queries over all keys, in columns instead of positions."""
    queries = observation.queries
    return make_call(
        queries.q,
        DenseKV(observation.k, observation.v),
        mask=Mask(),
        q_offset=observation.k.shape[2] - queries.q.shape[2],
        scale=queries.scale,
        softcap=queries.softcap,
        sink_logits=queries.sink_logits,
        attn_mask=_visible(observation),
    )


def _visible(observation: LayerObservation) -> Tensor | None:
    """Keys that exist and whose block a query read, `[B | 1, H, w, L]`; None for all."""
    queries, key_mask = observation.queries, observation.key_mask
    blocks, (_, kv_heads, length) = queries.blocks, observation.k.shape[:3]
    visible = None if key_mask is None else key_mask[:, :, None]
    if blocks is not None:
        at = torch.arange(length, device=blocks.device)[None, None]
        at = at if observation.positions is None else observation.positions.clamp_min(0)
        at = (at // queries.k_block)[:, :, None]  # [B | 1, Hkv | 1, 1, L]
        shape = torch.broadcast_shapes(blocks.shape[:3], at.shape[:3])
        read = blocks.expand(*shape, -1).gather(-1, at.expand(*shape, -1))
        visible = read if visible is None else read & visible
    if visible is None:
        return None
    heads, width = queries.q.shape[1:3]
    visible = visible.expand(-1, kv_heads, width, -1)
    return visible.repeat_interleave(heads // kv_heads, dim=1)
