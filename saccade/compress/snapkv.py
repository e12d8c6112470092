"""SnapKV (arXiv 2404.14469): keep the keys that the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.policy import LayerObservation, group_mean, observed_weights

SINKS = 4
"""First keys that stay: models rest attention on them (StreamingLLM, arXiv 2309.17453)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV:
    """Mean attention of the last `window` queries, pooled along the keys, per KV head.

    The paper scores every query head over repeated keys; here the scores of the query heads of a
    GQA group are averaged, so that the KV heads of the cache can be compressed as they are.

    Some keys stay whatever their score: the first 4 (sinks), then the newest of the window, up to
    half of what the budget leaves.  So a budget smaller than the window keeps the sinks, its
    newest keys and the best-scored ones, and a larger budget keeps what a smaller one keeps.

    Args:
        window: queries of the observation window, at the end of the prompt.
        kernel: width of the average pooling, which keeps neighbours of important keys.
    """

    window: int = 64
    kernel: int = 5

    @property
    def floor(self) -> None:
        """None: all heads keep equally many keys."""
        return

    @property
    def num_queries(self) -> int:
        """`window`."""
        return self.window

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf for the sinks and the newest keys that stay."""
        kv_heads, length = observation.k.shape[1:3]
        weights = group_mean(observed_weights(observation).mean(2), kv_heads)  # [B, Hkv, L]
        pooled = F.avg_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)
        staying = _staying(observation, min(self.window, observation.queries.q.shape[2]), kept)
        scores = pooled[..., :length].masked_fill(staying, torch.inf)
        key_mask = observation.key_mask
        return scores if key_mask is None else scores.masked_fill(~key_mask, -torch.inf)


def _staying(observation: LayerObservation, window: int, kept: int) -> Tensor:
    """Sinks and newest keys that stay under a budget, bool, broadcasts to `[B, Hkv, L]`."""
    length, key_mask = observation.k.shape[2], observation.key_mask
    sinks = min(SINKS, kept)
    newest = min(window, (kept - sinks + 1) // 2)
    column = torch.arange(length, device=observation.k.device)
    # The oldest key of a head with fewer keys than others is not in the first column.
    rank = column if key_mask is None else key_mask.cumsum(-1) - 1
    return (rank < sinks) | (column >= length - newest)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSnapKV:
    """SnapKV with one budget a layer, shared by its heads by score (Ada-KV, arXiv 2407.11550).

    Heads that attend to a few keys keep fewer than heads that attend to many.  The cache is ragged.

    Args:
        window, kernel: as SnapKV.
        floor: share of the budget that every head keeps.
    """

    window: int = 64
    kernel: int = 5
    floor: float = 0.2

    @property
    def num_queries(self) -> int:
        """`window`."""
        return self.window

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance `[B, Hkv, L]`, comparable between the heads of a layer."""
        return SnapKV(window=self.window, kernel=self.kernel).scores(observation, kept)
