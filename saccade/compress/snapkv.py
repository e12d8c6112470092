"""SnapKV (arXiv 2404.14469): keep the keys that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.policy import Observed, causal_weights, group_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV:
    """Attention of the last `window` queries, pooled along the keys; one choice per KV head.

    The paper scores every query head and repeats the keys; here the heads of a group vote
    together by their mean, so that a GQA cache shrinks as it is.

    Args:
        window: queries at the end of the prompt that vote; their own keys always stay.
        kernel: width of the average pooling that keeps neighbours of important keys.
    """

    floor: ClassVar[None] = None
    window: int = 64
    kernel: int = 5

    @property
    def num_queries(self) -> int:
        return self.window

    def scores(self, observed: Observed) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf inside the window."""
        kv_heads, length = observed.k.shape[1:3]
        votes = group_mean(causal_weights(observed).mean(2), kv_heads)  # [B, Hkv, L]
        pooled = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        newest = torch.arange(length, device=votes.device) >= length - observed.q.shape[2]
        scores = pooled[..., :length].masked_fill(newest, torch.inf)
        return scores if observed.real is None else scores.masked_fill(~observed.real, -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSnapKV:
    """SnapKV whose heads compete for one budget a layer (Ada-KV, arXiv 2407.11550).

    Heads that look at a few keys give room to heads that look at many.  The cache is ragged then.

    Args:
        window, kernel: as SnapKV.
        floor: share of the budget that every head gets for sure.
    """

    window: int = 64
    kernel: int = 5
    floor: float = 0.2

    @property
    def num_queries(self) -> int:
        return self.window

    def scores(self, observed: Observed) -> Tensor:
        """Importance `[B, Hkv, L]`, comparable between the heads of a layer."""
        return SnapKV(window=self.window, kernel=self.kernel).scores(observed)
