"""Summaries of blocks of keys: what a selection reads instead of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.selection.rule import SummaryKind


def summarize(k: Tensor, block: int, kind: SummaryKind) -> Tensor:
    """One row for each whole block of keys `[B, Hkv, n, D]`; a block that is not full has none.

    Returns:
        For "mean" float32 `[B, Hkv, n // block, D]`; for "bounds" `[B, Hkv, n // block, 2 D]` in
        the dtype of the keys: the maxima of the channels, then their minima (Quest, 2406.10774).
    """
    count = k.shape[2] // block
    blocks = k[:, :, : count * block].unflatten(2, (count, block))
    if kind == "mean":
        return blocks.mean(3, dtype=torch.float32)
    return torch.cat((blocks.amax(3), blocks.amin(3)), dim=-1)


def summary_width(head_dim: int, kind: SummaryKind) -> int:
    """Numbers of a row."""
    return {"none": 0, "mean": head_dim, "bounds": 2 * head_dim, "keys": head_dim}[kind]
