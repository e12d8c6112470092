"""The protocol of sparse patterns, and what they share: block positions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView


class Pattern(Protocol):
    """Chooses which blocks of keys each block of queries reads."""

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """Selection for queries `[B, H, Lq, D]` at positions q_offset .. over the view's keys.

        The selection is intersected with the mask of the call, so it need not be causal itself.
        """
        ...


def last_key_block(
    q_len: int, q_offset: int, q_block: int, k_block: int, device: torch.device
) -> Tensor:
    """Key block in which the last query of each query block lies, int64 `[q_blocks]`."""
    stops = torch.arange(q_block, q_len + q_block, q_block, device=device).clamp_max(q_len)
    return (q_offset + stops - 1) // k_block
