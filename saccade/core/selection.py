"""BlockSelection: which blocks of keys a block of queries may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.check import check_device, check_tensor, integer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSelection:
    """A boolean grid over (query block, key block), intersected with the Mask of the call.

    Attributes:
        allowed: bool `[batch | 1, kv_heads | 1, num_q_blocks, num_k_blocks]`.  One selection
            serves all query heads of a group, so that keys are read once.
        q_block: queries a block holds; query i of the call lies in block i // q_block.
        k_block: keys a block holds; key at position p lies in block p // k_block.

    Raises:
        TypeError: `allowed` is no such tensor, or a block size no integer.
        ValueError: block sizes below 1.
    """

    allowed: Tensor
    q_block: int
    k_block: int

    def __post_init__(self) -> None:
        check_tensor(
            "BlockSelection.allowed",
            self.allowed,
            (torch.bool,),
            "batch | 1, kv_heads | 1, q_blocks, k_blocks",
        )
        for name in ("q_block", "k_block"):
            size = integer(f"BlockSelection.{name}", getattr(self, name), least=1)
            object.__setattr__(self, name, size)

    def check_fits(self, q: Tensor, kv_heads: int) -> None:
        """Raise ValueError unless the grid has the batch and heads of a call, or 1."""
        batch, heads = self.allowed.shape[:2]
        if batch not in (1, q.shape[0]) or heads not in (1, kv_heads):
            raise ValueError(
                f"BlockSelection.allowed must be [{q.shape[0]} or 1, {kv_heads} or 1, q_blocks, "
                f"k_blocks], got {list(self.allowed.shape)}."
            )
        check_device("BlockSelection.allowed", self.allowed, q.device)

    def check_covers(self, q_len: int, num_keys: int) -> None:
        """Raise ValueError unless the grid has a row for each query and a column for each key."""
        need = (-(-q_len // self.q_block), -(-num_keys // self.k_block))
        have = tuple(self.allowed.shape[2:])
        if have[0] < need[0] or have[1] < need[1]:
            raise ValueError(
                f"BlockSelection covers {have[0]} x {have[1]} blocks, but {q_len} queries and "
                f"{num_keys} keys need {need[0]} x {need[1]} of {self.q_block} x {self.k_block}."
            )

    def visible(self, q_index: Tensor, k_pos: Tensor) -> Tensor:
        """Visibility `[batch | 1, kv_heads | 1, q, k]` for 1-D query indices and key positions."""
        return self.allowed[:, :, q_index // self.q_block][..., k_pos // self.k_block]
