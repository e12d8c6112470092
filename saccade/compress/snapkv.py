"""SnapKV (arXiv 2404.14469): keep the keys that the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import SINKS, Policy
from saccade.compress.window_attention import observed_received


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, pooled along the keys, per KV head.

    The paper scores every query head over repeated keys; here the scores of the query heads of a
    GQA group are averaged, so that the KV heads of the cache can be compressed as they are.

    Some keys stay whatever their score: the first `sinks`, then the newest of the window, up to
    half of what the budget leaves.  So a budget smaller than the window keeps the sinks, its
    newest keys and the best-scored ones, and a larger budget keeps what a smaller one keeps.
    kvpress keeps the window alone, `sinks=0` here, and takes no budget below it.

    Args:
        window: queries of the observation window, at the end of the prompt.
        kernel: width of the average pooling, which keeps neighbours of important keys; keys of the
            window and those before it are pooled apart.
        sinks: first keys that stay.
    """

    window: int = 64
    kernel: int = 5
    sinks: int = SINKS

    @property
    def observes(self) -> Observes:
        """The queries of the window."""
        return Observes(queries=self.window)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf for the sinks and the newest keys that stay."""
        length = observation.k.shape[2]
        window = min(self.window, observation.queries.q.shape[2])
        weights = observed_received(observation)  # [B, Hkv, L]
        parts = weights.split((length - window, window), dim=-1)
        pooled = torch.cat([self._pooled(part) for part in parts], dim=-1)
        staying = _staying(observation, min(self.sinks, kept), window, kept)
        return observation.only_keys(pooled.masked_fill(staying, torch.inf))

    def _pooled(self, weights: Tensor) -> Tensor:
        """Weights `[B, Hkv, n]`, averaged over `kernel` neighbours."""
        length = weights.shape[-1]
        if not length:
            return weights
        pooled = F.avg_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled[..., :length]


def _staying(observation: LayerObservation, sinks: int, window: int, kept: int) -> Tensor:
    """Sinks and newest keys that stay under a budget, bool, broadcasts to `[B, Hkv, L]`."""
    length = observation.k.shape[2]
    newest = min(window, (kept - sinks + 1) // 2)
    column = torch.arange(length, device=observation.k.device)
    # The oldest key of a head with fewer keys than others is not in the first column.
    return (observation.rank < sinks) | (column >= length - newest)
