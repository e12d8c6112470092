"""Attention over parts of the keys, combined into attention over all of them by their lse.

    out = sum over parts of exp(lse_part - lse) out_part        lse = log sum exp(lse_part)

A row that attends to nothing in a part has an lse of -inf there, and the weight of that part is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput


class Combiner:
    """A running sum over parts, in float32, in the memory of one output.

    Args:
        shape: `(batch, heads, q_len, value_dim)` of the output.
        like: a tensor whose device, and for the result whose dtype, is taken.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self._out = like.new_zeros(shape, dtype=torch.float32)
        self._lse = like.new_full(shape[:3], -torch.inf, dtype=torch.float32)
        self._dtype = like.dtype

    def add(self, part: AttentionOutput, start: int, stop: int) -> None:
        """Add a part to which the queries start .. stop-1 alone attend."""
        out, lse = self._out[:, :, start:stop], self._lse[:, :, start:stop]
        total = torch.logaddexp(lse, part.lse)
        weight = (part.lse - total).exp().nan_to_num_(0.0)[..., None]
        out.mul_(1 - weight).addcmul_(part.out.float(), weight)
        lse.copy_(total)

    def result(self) -> AttentionOutput:
        """Attention over all parts so far."""
        return AttentionOutput(self._out.to(self._dtype), self._lse)


def with_sink_logits(result: AttentionOutput, sink_logits: Tensor) -> AttentionOutput:
    """Fold learned sinks `[heads]` in afterwards: they only make the denominator larger."""
    lse = torch.logaddexp(result.lse, sink_logits.float()[None, :, None])
    share = (result.lse - lse).exp()[..., None]
    return AttentionOutput((result.out * share).to(result.out.dtype), lse)
