"""SnapKV (arXiv 2404.14469): keep the keys that the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.policy import LayerObservation, causal_weights, group_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV:
    """Mean attention of the last `window` queries, pooled along the keys, per KV head.

    The paper scores every query head over repeated keys; here the scores of the query heads of a
    GQA group are averaged, so that the KV heads of the cache can be compressed as they are.

    Args:
        window: queries of the observation window, at the end of the prompt; their keys stay.
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

    def scores(self, observation: LayerObservation) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf for the keys of the observation window."""
        kv_heads, length = observation.k.shape[1:3]
        weights = group_mean(causal_weights(observation).mean(2), kv_heads)  # [B, Hkv, L]
        pooled = F.avg_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)
        in_window = torch.arange(length, device=pooled.device) >= length - observation.q.shape[2]
        scores = pooled[..., :length].masked_fill(in_window, torch.inf)
        key_mask = observation.key_mask
        return scores if key_mask is None else scores.masked_fill(~key_mask, -torch.inf)


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

    def scores(self, observation: LayerObservation) -> Tensor:
        """Importance `[B, Hkv, L]`, comparable between the heads of a layer."""
        return SnapKV(window=self.window, kernel=self.kernel).scores(observation)
