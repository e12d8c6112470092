"""What a policy may see of a layer: keys, values, its newest queries, statistics of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rereading(NamedTuple):
    """How a context is read a second time; see `KVzip`.

    Attributes:
        chunk: tokens that are repeated at once, over the keys of these tokens and the sinks.
        share: share of them that is read, evenly spaced.
        lead: tokens before the chunk that are read ahead of it.
        sinks: first keys that every chunk attends to.
    """

    chunk: int
    share: float
    lead: int
    sinks: int

    def chosen(self, start: int, stop: int) -> list[int]:
        """Positions that are read for the chunk start .. stop-1, in order."""
        return [
            *range(max(0, start - self.lead), start),
            *(i for i in range(start, stop) if int((i + 1) * self.share) > int(i * self.share)),
        ]


class Observes(NamedTuple):
    """What a policy has to see of a layer beside its keys and values.

    Attributes:
        queries: how many of the newest queries; the last one is there in any case.
        future: positions behind the text over which the statistics of all queries are averaged, 0
            for a policy that needs none.
        output: whether it weighs values by the layer's output projection.
        received: whether it needs the weight that each key received from all queries.
        rereading: how the context is read again for the weights of that, None: not at all.
    """

    queries: int = 1
    future: int = 0
    output: bool = False
    received: bool = False
    rereading: Rereading | None = None


class ObservedQueries(NamedTuple):
    """The newest w queries of a layer and how it weighs its keys.

    Attributes:
        q: `[B, H, w, D]`, after RoPE.
        scale, softcap, sink_logits: of the layer's attention; see `saccade.attention`.
        blocks: bool `[B | 1, Hkv | 1, w, num_blocks]`, the blocks of keys that each query read
            under a sparse pattern; None for all.
        k_block: keys a block holds, 0 without blocks.
        counted, mean, scatter: of all queries before RoPE, the first few left out, where a policy
            asks for them: how many, float32 `[B]`; their mean `[B, H, D]`; the sum of products of
            their differences from it `[B, H, D, D]`.  See `compress.query_statistics`.
        received: float32 `[B, Hkv, n]`, the weight that the key at each position (in a cache
            without positions: in each slot) received from all queries so far, where a policy asks.
    """

    q: Tensor
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    blocks: Tensor | None = None
    k_block: int = 0
    counted: Tensor | None = None
    mean: Tensor | None = None
    scatter: Tensor | None = None
    received: Tensor | None = None


class ExpectedQueries(NamedTuple):
    """Queries that a layer is likely to ask next, as a normal distribution.

    Attributes:
        mean: `[B, H, D]`; covariance: `[B, H, D, D]`, both float32 and after RoPE.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """What a policy scores the keys of one layer by, after the prompt.

    Attributes:
        queries: of the observation window, the newest w tokens.
        k: all keys `[B, Hkv, L, D]`, the newest last; v: all values `[B, Hkv, L, Dv]`.
        positions: int64 `[B, Hkv, L]`, ascending, -1 (on the left) where a head has no key, for
            heads with fewer keys than others; None: key i is at position i.
        expected: the queries to come, for a policy that observes `future` positions.
        output: `[H, Dv, hidden]`, the part of the output projection that each query head's result
            is multiplied with, for a policy that observes it.
        received: `[B, Hkv, L]` float32, the weight that each key received from all queries, or the
            largest while the context was read again, for a policy that observes one of them.
    """

    queries: ObservedQueries
    k: Tensor
    v: Tensor
    positions: Tensor | None = None
    expected: ExpectedQueries | None = None
    output: Tensor | None = None
    received: Tensor | None = None

    @property
    def key_mask(self) -> Tensor | None:
        """bool `[B, Hkv, L]`, True where a head has a key; None: everywhere."""
        return None if self.positions is None else self.positions >= 0

    @property
    def rank(self) -> Tensor:
        """Of each key among those of its head, the oldest 0: int64, broadcasts to `[B, Hkv, L]`."""
        if self.positions is None:
            return torch.arange(self.k.shape[2], device=self.k.device)
        return (self.positions >= 0).cumsum(-1) - 1

    def only_keys(self, scores: Tensor) -> Tensor:
        """Scores `[B, Hkv, L]` with -inf where a head has no key."""
        mask = self.key_mask
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)
