"""AttentionOutput: what every attention operator returns."""

from __future__ import annotations

from typing import NamedTuple

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
