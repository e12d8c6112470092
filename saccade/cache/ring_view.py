"""What a captured decoding step reads of a ring: all slots, with their positions on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import RaggedKV

UNBOUNDED = 2**30
"""`end` of the view of a captured step: past every position, as the last one is on the device."""


def one_page_per_head(k: Tensor, v: Tensor) -> RaggedKV:
    """Storage `[B, Hkv, slots, D]` as a ragged view; its positions have yet to be filled."""
    batch, heads, slots, _ = k.shape
    rows = batch * heads
    return RaggedKV(
        k=k.flatten(0, 1),
        v=v.flatten(0, 1),
        positions=torch.empty(rows, slots, dtype=torch.int32, device=k.device),
        page_table=torch.arange(rows, dtype=torch.int32, device=k.device).view(batch, heads, 1),
        kv_lens=torch.full((batch, heads), slots, dtype=torch.int32, device=k.device),
        end=UNBOUNDED,
        max_length=slots,
    )
