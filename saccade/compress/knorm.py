"""Knorm (arXiv 2406.11430): keep the keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation
from saccade.compress.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Knorm(Policy):
    """Keys by their L2 norm, the smallest first: small keys tend to receive much attention.

    It needs no queries, so it costs next to nothing.
    """

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """The negative norm of each key, `[B, Hkv, L]`."""
        norm = torch.linalg.vector_norm(observation.k.float(), dim=-1)
        return observation.only_keys(-norm)
