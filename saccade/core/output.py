"""AttentionOutput: what every attention operator returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionOutput(NamedTuple):
    """Result of an attention operator, the same for every backend.

    Attributes:
        out: `[batch, heads, q_len, value_dim]` in the dtype of q; 0 where a query has no key.
        lse: `[batch, heads, q_len]` float32, natural log of the sum of exponentials (a learned
            `sink_logits` term included); -inf where a query has no key.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def joined(cls, parts: Sequence[AttentionOutput]) -> AttentionOutput:
        """Results of consecutive queries as one."""
        return cls(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))
