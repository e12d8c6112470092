"""R-KV (arXiv 2505.24133): keep keys that are attended to and unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.observation import LayerObservation, Observes
from saccade.compress.policy import Policy
from saccade.compress.window_attention import observed_scores

ROWS = 256
"""Keys compared with all others at once: memory is ROWS * L numbers a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RKV(Policy):
    """Attention of the newest queries, less how much a key is like the others of its head.

    Long answers repeat themselves, and repeated tokens attend to each other: by attention alone a
    cache fills with copies.  Each key is like the others by the mean of its cosines to them; of
    those that are alike, the newest is counted as less of a copy.  The formula is that of the
    authors' code; it compares every key with every other, so it is meant for a bounded cache, with
    `kv_every`.

    Args:
        window: newest queries; their keys stay, up to half of the budget.
        kernel: width of the maximum along the keys.
        attention: weight of attention in the score, the rest is that of likeness.
        alike: cosine from which on a newer key is a copy.
    """

    window: int = 8
    kernel: int = 7
    attention: float = 0.07
    alike: float = 0.5

    @property
    def observes(self) -> Observes:
        """The queries of the window."""
        return Observes(queries=self.window)

    def scores(self, observation: LayerObservation, kept: int) -> Tensor:
        """Score of each key `[B, Hkv, L]`; +inf for the newest."""
        length = observation.k.shape[2]
        window = min(self.window, observation.queries.q.shape[2])
        column = torch.arange(length, device=observation.k.device)
        newest = column >= length - min(window, (kept + 1) // 2)
        logits = observed_scores(observation).amax(2)  # [B, Hkv, w, L], the most of a group
        logits = logits.masked_fill(column >= length - window, -torch.inf)
        weights = logits.softmax(-1).nan_to_num().mean(2)
        padding = self.kernel // 2
        weights = F.max_pool1d(weights, self.kernel, stride=1, padding=padding)[..., :length]
        likeness = self.likeness(observation.k, observation.key_mask)
        scores = self.attention * weights - (1 - self.attention) * likeness
        return observation.only_keys(scores.masked_fill(newest, torch.inf))

    def likeness(self, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """How much each key is like the others, a softmax over the keys, `[B, Hkv, L]` float32.

        Args:
            k: `[B, Hkv, L, D]`; key_mask: bool `[B, Hkv, L]`, True where there is a key.
        """
        unit = F.normalize(k.float(), dim=-1)
        length = unit.shape[2]
        exists = torch.ones_like(unit[..., 0], dtype=torch.bool) if key_mask is None else key_mask
        unit = unit.masked_fill(~exists[..., None], 0)
        column = torch.arange(length, device=k.device)
        oldest = exists.int().argmax(-1, keepdim=True)  # a key like no other leaves it out
        total = torch.zeros_like(unit[..., 0])
        for rows in column.split(ROWS):
            cosines = unit[:, :, rows] @ unit.mT  # [B, Hkv, rows, L]
            cosines = cosines.masked_fill(rows[:, None] == column, 0)
            copies = (cosines > self.alike) * column
            at = torch.maximum(copies.amax(-1), oldest)
            total += cosines.scatter(-1, at[..., None], 0).sum(2)
        total = total / exists.sum(-1, keepdim=True).clamp_min(1)
        return total.masked_fill(~exists, -torch.inf).softmax(-1).nan_to_num()
