"""KeyDiff (arXiv 2504.15364): keep the keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from saccade.compress.observation import LayerObservation
from saccade.compress.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDiff(Policy):
    """Keys by how little they point where the keys of their head point on average.

    It needs no queries: what is common to all keys changes no weight, since every query's softmax
    ignores it.
    """

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Minus the cosine of each key and the mean of all normalized keys, `[B, Hkv, L]`."""
        k, mask = observation.k.float(), observation.key_mask
        unit = F.normalize(k, dim=-1)
        if mask is not None:
            unit = unit.masked_fill(~mask[..., None], 0)
        anchor = unit.sum(2, keepdim=True)  # of the direction of the mean
        return observation.only_keys(-F.cosine_similarity(k, anchor, dim=-1))
