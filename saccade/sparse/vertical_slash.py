"""Dynamic sparsity for prompts: the columns and diagonals that the last queries attend to.

The vertical-slash pattern of MInference (Jiang et al., arXiv 2407.02490), in blocks: some tokens
are read by all later ones (columns), and some distances by all queries (diagonals).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.selection import products
from saccade.sparse.prompt import PromptCall, PromptPattern
from saccade.sparse.sizes import check_sizes

LEAST_SHARE: Final = 64
"""At most one of so many queries is scored, so that scoring a short chunk stays cheap."""

PIECE: Final = 1 << 20
"""Most scores that are made at once on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerticalSlash(PromptPattern):
    """Blocks of columns and bands of diagonals that hold most attention of a call's last queries.

    The attention of the last queries to all keys is added up by block of keys, and by distance in
    bands as wide as a block; every block that holds a pair of a chosen column or band is read (two
    a band).  The heads that share a KV head share their selection.  Each chunk of a prompt is
    scored by its own last queries.  Decoding reads all keys.

    Args:
        block: tokens in a block of queries and of keys, and distances in a band.
        columns: blocks of keys chosen by weight among those that the last queries do not read
            anyway.
        diagonals: bands chosen by weight among those outside of the window.
        queries: how many last queries are scored, at most a 64th of those of the call.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block, queries or window_blocks below 1, the others below 0.
    """

    block: int = 64
    columns: int = 16
    diagonals: int = 8
    queries: int = 64
    sink_blocks: int = 1
    window_blocks: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, queries=1, sink_blocks=0)
        check_sizes(self, columns=0, diagonals=0)

    def chosen(self, call: PromptCall) -> Tensor:
        """Blocks of the best columns, and those that the best bands cross."""
        last = _last_queries(call)
        columns, distances = self._sums(call, last)
        columns = _summed(columns, self.block)
        row = ((last - call.q_offset) // self.block)[:, None, None, None]
        others = (call.seen & ~call.always).expand(*columns.shape[:2], -1, -1)
        others = others.take_along_dim(row, dim=2).squeeze(2)
        columns = _best(columns, others, self.columns)
        bands = _summed(distances, self.block)
        far = torch.arange(bands.shape[2], device=bands.device) > self.window_blocks - 2
        crossed = self._crossed(_best(bands, far, self.diagonals), call)
        return columns[:, :, None] | crossed

    def _sums(self, call: PromptCall, last: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the queries up to `last` by key and by distance, both `[B, Hkv, Lk]`."""
        (k, real), length, n = call.keys(), call.q.shape[2], call.kv.shape[2]
        count = min(self.queries, -(-length // LEAST_SHARE))
        columns = k.new_zeros(*k.shape[:2], n, dtype=torch.float32)
        diagonals = pad(columns, (0, count))  # by last position - distance
        at_once = max(1, (PIECE if k.is_cpu else 64 * PIECE) // (call.q.shape[:2].numel() * n))
        for start in range(0, count, at_once):
            back = torch.arange(start, min(start + at_once, count), device=k.device)
            weights = _attention(call, k, real, last[:, None] - back)
            columns += weights.sum(2)
            for i, row in enumerate(weights.unbind(2), start):
                diagonals[:, :, i : i + n] += row
        at = (last[:, None] - torch.arange(n, device=k.device))[:, None]
        distances = diagonals.gather(2, at.clamp_min(0).expand_as(columns))
        return columns, distances.masked_fill(at < 0, 0)

    def _crossed(self, bands: Tensor, call: PromptCall) -> Tensor:
        """Blocks with a pair in a band of `bands [B, Hkv, n]`: bool `[.., q_blocks, k_blocks]`."""
        stop, device = call.q_offset + call.q.shape[2], bands.device
        first = torch.arange(call.q_offset, stop, self.block, device=device)[:, None]
        last = (first + self.block).clamp_max(stop) - 1
        blocks = torch.arange(call.seen.shape[1], device=device)
        nearest = (first - self.block * (blocks + 1) + 1) // self.block
        farthest = (last - self.block * blocks) // self.block
        found = torch.zeros((), dtype=torch.bool, device=device)
        for step in range(3):  # as many bands as a block can have a part in
            band = nearest + step
            here = (band >= 0) & (band <= farthest)
            found = found | (bands[:, :, band.clamp(0, bands.shape[2] - 1)] & here)
        return found


def _last_queries(call: PromptCall) -> Tensor:
    """Position of the last query of each row that is no padding, int64 `[B | 1]`."""
    stop = call.q_offset + call.q.shape[2]
    places = torch.arange(stop, device=call.q.device)
    if call.padding is None:
        return places[-1:]
    return (places * call.padding[:, :stop]).amax(1).clamp_min(call.q_offset)


def _attention(call: PromptCall, k: Tensor, real: Tensor | None, at: Tensor) -> Tensor:
    """Weights `[B, Hkv, t, Lk]` of queries at positions `at [B | 1, t]`, summed over heads.

    Those of queries that are before the call's first are 0.
    """
    batch, heads, _, dim = call.q.shape
    index = (at - call.q_offset)[:, None, :, None]
    q = call.q.gather(2, index.clamp_min(0).expand(batch, heads, -1, dim)) * dim**-0.5
    q = q.unflatten(1, (k.shape[1], -1))
    scores = products(q.flatten(2, 3), k).unflatten(2, q.shape[2:4])
    first = 0 if call.padding is not None else call.q_offset  # all see the keys before it
    later = torch.arange(first, k.shape[2], device=k.device) > at[:, None, :, None]
    scores[..., first:].masked_fill_(later[:, None], -torch.inf)
    if real is not None:
        scores.masked_fill_(~real[:, :, None, None], -torch.inf)
    weights = scores.softmax(-1).sum(2)
    return weights if call.padding is None else weights.nan_to_num(0) * (index >= 0)


def _summed(x: Tensor, size: int) -> Tensor:
    """Sums of `size` neighbours along the last axis."""
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _best(weights: Tensor, others: Tensor, count: int) -> Tensor:
    """The `count` largest weights among `others`: bool, shaped like the weights."""
    weights = weights.masked_fill(~others, -1)
    best = weights.topk(min(count, weights.shape[-1])).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, value=True) & others
