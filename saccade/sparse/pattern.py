"""The protocol of block-sparse patterns."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView


class Pattern(Protocol):
    """Chooses which blocks of keys each block of queries attends to."""

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """The selected blocks; the operator intersects them with the mask of the call.

        Args:
            q: queries `[B, H, Lq, D]`, after RoPE.
            kv: the view they attend to, `[B, Hkv, end, D]`.
            q_offset: position of the first query.
        """
        ...


def last_key_block(
    q_len: int, q_offset: int, q_block: int, k_block: int, device: torch.device
) -> Tensor:
    """Key block in which the last query of each query block lies, int64 `[q_blocks]`."""
    stops = torch.arange(q_block, q_len + q_block, q_block, device=device).clamp_max(q_len)
    return (q_offset + stops - 1) // k_block
