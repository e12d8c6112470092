"""ExpectedAttention (arXiv 2510.00636): keep the keys that coming queries are likely to read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import SINKS, Policy, group_mean

ROWS = 256
"""Keys whose products stay in the nearer caches of a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedAttention(Policy):
    """Expected weight of each key under the queries to come, times the size of its value.

    Queries before RoPE are taken as normally distributed, with the mean and covariance of those of
    the prompt; RoPE of the next `future` positions, averaged, turns both.  The mean of
    exp(scale * q.k) is then exp(scale * mean.k + scale^2 / 2 * k' covariance k).  It does not
    depend on how the prompt ends, so it serves questions that are not known yet.

    Softcap and learned sinks are left out.

    Args:
        future: positions behind the prompt that are averaged over.
        sinks: first keys that stay; queries of the same tokens are not counted.
        epsilon: added to each weight before it is multiplied by the size of the value.
    """

    future: int = 512
    sinks: int = SINKS
    epsilon: float = 0.0

    @property
    def observes(self) -> Observes:
        """The statistics of all queries."""
        return Observes(future=self.future)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Importance `[B, Hkv, L]`; +inf for the sinks."""
        assert observation.expected is not None, "the policy observes it"
        k, kv_heads = observation.k, observation.k.shape[1]
        scale = observation.queries.scale
        mean, covariance = (x.unflatten(1, (kv_heads, -1)) for x in observation.expected)
        mean, covariance = scale * mean, scale**2 / 2 * covariance
        parts = [_expected_logits(part.float(), mean, covariance) for part in k.split(ROWS, dim=2)]
        logits = torch.cat(parts, dim=-1)  # [B, Hkv, G, L]
        rank = observation.rank.expand(k.shape[:3])
        left_out = (rank < self.sinks)[:, :, None]  # the sinks take no part in the softmax
        weights = F.softmax(logits.masked_fill(left_out, -torch.inf), -1).nan_to_num()
        weights = group_mean(weights.flatten(1, 2), kv_heads)
        sizes = torch.linalg.vector_norm(observation.v.float(), dim=-1)
        scores = (weights + self.epsilon) * sizes
        scores = scores.masked_fill(rank < min(self.sinks, kept), torch.inf)
        return observation.only_keys(scores)


def _expected_logits(k: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """mean.k + k' covariance k of each key, `[B, Hkv, G, n]`.

    Args:
        k: `[B, Hkv, n, D]`; mean: `[B, Hkv, G, D]`; covariance: `[B, Hkv, G, D, D]`.
    """
    rows = covariance.transpose(2, 3).flatten(3)  # [B, Hkv, D, G * D]: one product for a group
    turned = (k @ rows).unflatten(3, mean.shape[2:])  # [B, Hkv, n, G, D]
    return (turned.add_(mean[:, :, None]).mul_(k[:, :, :, None])).sum(-1).mT
