"""H2O (arXiv 2306.14048): keep the keys that have received most attention, and the newest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(Policy):
    """Weight that a key received from all queries so far, summed, the mean of its group of heads.

    The weights are those of the attention that runs anyway (`ops.attend_received`), and nothing of
    the size of the prompt squared is ever stored.  The sum favours old keys, which more
    queries have seen; a part of the budget therefore goes to the newest, as in the paper.

    Args:
        newest: share of the budget that the newest keys take.
        average: divide by the number of queries that could see the key, as kvpress'
            ObservedAttention does; exact for a text that was not compressed before.
    """

    newest: float = 0.5
    average: bool = False

    @property
    def observes(self) -> Observes:
        """The weights of all queries."""
        return Observes(received=True)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Received weight of each key `[B, Hkv, L]`; +inf for the newest."""
        assert observation.received is not None, "the policy observes it"
        length = observation.k.shape[2]
        behind = torch.arange(length, 0, -1, device=observation.k.device)  # itself counted
        scores = observation.received / behind if self.average else observation.received
        scores = scores.masked_fill(behind <= int(self.newest * kept), torch.inf)
        return observation.only_keys(scores)
