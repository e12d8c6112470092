"""CriticalKV (arXiv 2502.03805): half of the budget by score, the rest by what values do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import best, group_mean, select_across_heads
from saccade.compress.snapkv import SnapKV

FIRST_STAGE = 0.5
EPSILON = 1e-4
"""Added to each score in the second stage, so that values still count where scores are 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalSnapKV(SnapKV):
    """SnapKV whose second half of the budget goes to score times `|v Wo|`, the L1 norm.

    A key matters as far as its value changes the output of the layer: the product of its weight
    and the size of its value behind the output projection bounds what removing it changes.

    Args:
        window, kernel, sinks: as SnapKV.
    """

    @property
    def observes(self) -> Observes:
        """The queries of the window and the output projection."""
        return Observes(queries=self.window, output=True)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf for what the first stage keeps."""
        scores = super(CriticalSnapKV, self).scores(observation, kept)
        first = best(scores, max(1, int(kept * FIRST_STAGE))) & (scores > -torch.inf)
        weighed = (scores + EPSILON) * output_norms(observation)
        return observation.only_keys(weighed.masked_fill(first, torch.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalAdaSnapKV(CriticalSnapKV):
    """CriticalSnapKV with one budget a layer, which heads share by the scores of SnapKV.

    Args:
        window, kernel, sinks: as SnapKV.
        floor: share of the budget that every head keeps.
    """

    floor: float | None = 0.2

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """+inf for what each head keeps, `[B, Hkv, L]`; how many, its scores say."""
        scores = super(CriticalSnapKV, self).scores(observation, kept)
        exists = scores > -torch.inf
        budgets = select_across_heads(scores, kept, self.floor or 0.0).sum(-1, keepdim=True)
        first = _order(scores) < (budgets * FIRST_STAGE).long()
        weighed = ((scores + EPSILON) * output_norms(observation)).masked_fill(first, torch.inf)
        weighed = observation.only_keys(weighed)
        return weighed.masked_fill((_order(weighed) < budgets) & exists, torch.inf)


def output_norms(observation: LayerObservation) -> Tensor:
    """`|v Wo|` of each value, the mean over the query heads of its group, `[B, Hkv, L]` float32."""
    assert observation.output is not None, "the policy observes it"
    v, output = observation.v.float(), observation.output.float()
    kv_heads = v.shape[1]
    group = output.shape[0] // kv_heads
    # One head after another: all at once would hold heads * hidden numbers of each key.
    norms = [(v[:, i // group] @ each).abs().sum(-1) for i, each in enumerate(output)]
    return group_mean(torch.stack(norms, dim=1), kv_heads)


def _order(scores: Tensor) -> Tensor:
    """Place of each key among those of its head by score, 0 for the best, int64 `[B, Hkv, L]`."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)
