"""TOVA (arXiv 2401.06104): keep the keys that the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import Policy
from saccade.compress.window_attention import observed_received


@dataclass(frozen=True, slots=True, kw_only=True)
class TOVA(Policy):
    """Weight of the newest query on each key, averaged over all heads of the layer.

    All KV heads keep the same tokens.  The newest key stays; the paper lets it compete, with a
    weight that is high in practice.
    """

    @property
    def observes(self) -> Observes:
        """The newest query."""
        return Observes(queries=1)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Mean weight of each key `[B, Hkv, L]`; +inf for the newest."""
        scores = observed_received(observation, newest=1).mean(1, keepdim=True)
        scores = scores.expand(observation.k.shape[:3]).clone()
        scores[..., -1] = torch.inf
        return observation.only_keys(scores)
