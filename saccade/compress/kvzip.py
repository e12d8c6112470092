"""KVzip (arXiv 2505.23416): keep the keys that the model needs to write its context once more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes, Rereading
from saccade.compress.policy import SINKS, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzip(Policy):
    """The largest weight that a key receives while the model reads its context a second time.

    Behind the context its tokens follow again, chunk by chunk, and attend to it; what they attend
    to is what repeating the text, and so any question about it, needs.  The heads of all layers
    share one budget by these weights, as in the paper.

    The paper reads every token again, which costs more than the prompt did, behind an instruction,
    which is left out here: the model finds its place by the tokens.  `share=1, kernel=1` is its
    score for a text of one chunk.

    Args:
        chunk: tokens of the context that are repeated at once, over their own keys and the sinks
            alone, so that the cost grows with the length and not with its square.
        share: share of the tokens that is read again, evenly spaced.
        kernel: width of the maximum along the keys: a token that is read attends to itself and to
            the next one, and those that are left out between two of them are as important.
        lead: tokens before a chunk that are repeated ahead of it, to say where it begins.
        sinks: first keys that stay.
    """

    chunk: int = 512
    share: float = 0.4
    kernel: int = 3
    lead: int = 8
    sinks: int = SINKS
    floor: float | None = 0.0
    across_layers: bool = True

    @property
    def observes(self) -> Observes:
        """The weights of a second reading."""
        return Observes(rereading=Rereading(self.chunk, self.share, self.lead, self.sinks))

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Largest weight of each key `[B, Hkv, L]`; +inf for the sinks."""
        assert observation.received is not None, "the policy observes it"
        rank = observation.rank.expand(observation.k.shape[:3])
        length = observation.k.shape[2]
        pooled = F.max_pool1d(observation.received, self.kernel, 1, self.kernel // 2)
        scores = pooled[..., :length].masked_fill(rank < min(self.sinks, kept), torch.inf)
        return observation.only_keys(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformKVzip(KVzip):
    """KVzip with equally many keys of every head, which quantized caches can hold too.

    Args:
        chunk, share, kernel, lead, sinks: as KVzip.
    """

    floor: float | None = None
    across_layers: bool = False
