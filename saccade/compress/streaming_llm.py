"""StreamingLLM (arXiv 2309.17453): keep the first and the newest keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation
from saccade.compress.policy import SINKS, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(Policy):
    """The first `sinks` keys and the newest ones; everything between them goes.

    The keys keep their positions.  The paper moves them together, as `n_swa` with `n_sinks` does.

    Args:
        sinks: first keys that stay.
    """

    sinks: int = SINKS

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """How new each key is, `[B, Hkv, L]`; +inf for the sinks."""
        rank = observation.rank.expand(observation.k.shape[:3])
        scores = rank.to(torch.float64).masked_fill(rank < min(self.sinks, kept), torch.inf)
        return observation.only_keys(scores)
