"""Which layers are to choose for which others: measured on a text that is read densely.

Kascade (arXiv 2512.16391) reuses the blocks that one layer chose in the layers behind it.  What a
layer loses by that is the share of its softmax weights that falls on other blocks.  The lost shares
of all pairs of layers are measured, and dynamic programming finds the anchors that lose least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView
from saccade.ops.selection import block_mass
from saccade.sparse.kascade import Kascade
from saccade.sparse.kascade_plan import Reuse
from saccade.sparse.pattern import LayeredPattern, Pattern
from saccade.sparse.prompt import keys_by_position

QUERIES = 8
"""Of each chunk, spread over it; each is measured as the step of decoding that it would be."""


@dataclass(slots=True)
class Noted:
    """What one layer attended to, query after query.

    Attributes:
        weights: float32 `[Hkv, blocks]` of each query, means over the heads of a KV head.
        chosen: bool, the blocks that an anchor would read.
    """

    weights: list[Tensor] = field(default_factory=list[Tensor])
    chosen: list[Tensor] = field(default_factory=list[Tensor])


@dataclass(frozen=True, slots=True, eq=False)
class Calibration(LayeredPattern):
    """A pattern that reads everything, and notes what each layer attends to.

    Attributes:
        pattern: whose blocks are measured.
        noted: layer -> what was found.
        listening: whether calls are measured, one element.
    """

    pattern: Kascade
    noted: dict[int, Noted] = field(default_factory=dict[int, Noted])
    listening: list[bool] = field(default_factory=lambda: [False])

    def layers(self, num_layers: int) -> Sequence[Pattern | None]:
        """See LayeredPattern."""
        return [_Listener(self, index) for index in range(num_layers)]

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern; all blocks."""
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        return BlockSelection(allowed=allowed, q_block=q.shape[2], k_block=kv.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class _Listener:
    whole: Calibration
    layer: int

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        if self.whole.listening[0]:
            self._note(q, kv, q_offset)
        return self.whole.select(q, kv, q_offset)

    def _note(self, q: Tensor, kv: KVView, q_offset: int) -> None:
        noted = self.whole.noted.setdefault(self.layer, Noted())
        pattern, length = self.whole.pattern, q.shape[2]
        k, _ = keys_by_position(kv, None)
        for i in range(1, QUERIES + 1):
            at = length * i // QUERIES - 1
            own, end = q[:1, :, at : at + 1], q_offset + at + 1
            mass = block_mass(own, k[:1, :, :end], end - 1, pattern.block)[0, :, 0]
            noted.weights.append((mass * k.shape[1] / q.shape[1]).cpu())
            noted.chosen.append(chosen(noted.weights[-1], pattern))


def chosen(weights: Tensor, pattern: Kascade) -> Tensor:
    """The blocks that an anchor reads for the newest query: bool like weights `[Hkv, blocks]`."""
    blocks = torch.arange(weights.shape[1])
    always = (blocks < pattern.sink_blocks) | (blocks >= len(blocks) - pattern.window_blocks)
    others = weights.masked_fill(always, -1)
    best = others.topk(min(pattern.top, len(blocks)), -1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, best, value=True) | always


def recalls(noted: Mapping[int, Noted]) -> dict[tuple[int, int], Tensor]:
    """(anchor, layer) -> share of the weights of each KV head on the blocks of each of the anchor.

    Float64 `[Hkv of the layer, Hkv of the anchor]`, means over the queries; no anchor is behind
    its layer.
    """
    weights = {i: torch.cat(each.weights, 1).double() for i, each in noted.items()}
    chosen = {i: torch.cat(each.chosen, 1).double() for i, each in noted.items()}
    return {
        (a, i): weights[i] @ chosen[a].T / len(noted[i].weights)
        for a in noted for i in noted if a <= i
    }  # fmt: skip


def best_reuse(noted: Mapping[int, Noted], anchors: int) -> dict[int, Reuse]:
    """Layer -> where it has its blocks from, with so many anchors; the first layer has none.

    Each layer follows the last anchor before it, and each of its KV heads the KV head of the
    anchor whose blocks keep most of its weights.
    """
    found, layers = recalls(noted), sorted(noted)[1:]
    kept = {pair: float(each.amax(1).mean()) for pair, each in found.items()}
    starts = best_starts([[1 - kept[a, i] for i in layers if i >= a] for a in layers], anchors)
    plan = dict[int, Reuse]()
    for first, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        anchor = layers[first]
        for layer in layers[first:stop]:
            heads = found[anchor, layer].argmax(1).tolist()
            if layer == anchor:
                heads = list(range(len(heads)))
            plan[layer] = Reuse(anchor, tuple(heads), round(kept[anchor, layer], 6))
    return plan


def best_starts(lost: Sequence[Sequence[float]], count: int) -> list[int]:
    """Where runs of layers begin so that the sum of their losses is the least.

    Args:
        lost: `lost[a][i]` is what layer a + i loses in a run that begins at a.
        count: of runs, at least 1; no more than there are layers.

    Returns:
        The first layer of each run, from 0 on.
    """
    n = len(lost)
    runs = [[0.0] * (n + 1) for _ in range(n)]  # of layers a to b - 1
    for a in range(n):
        for i, each in enumerate(lost[a]):
            runs[a][a + i + 1] = runs[a][a + i] + each
    best = {(0, 0): (0.0, list[int]())}
    for k in range(1, min(count, n) + 1):
        for b in range(k, n + 1):
            options = (
                (best[k - 1, a][0] + runs[a][b], [*best[k - 1, a][1], a])
                for a in range(k - 1, b)
                if (k - 1, a) in best
            )
            best[k, b] = min(options)
    return best[min(count, n), n][1]
