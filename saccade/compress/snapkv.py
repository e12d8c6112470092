"""SnapKV (arXiv 2404.14469): keep the keys that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass

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
        return pooled[..., :length].masked_fill(newest, torch.inf)
