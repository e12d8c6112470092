"""PerHeadFP8: eight-bit floating point with one scale a head, x = qdata * scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.check import (
    FLOATS,
    LAYOUT,
    check_exactly,
    check_tensor,
    describe,
    is_plain_tensor,
)
from saccade.core.formats import FP8, FP8_MAX


@dataclass(frozen=True, slots=True)
class PerHeadFP8:
    """fp8 queries, keys or values: x = qdata * scale, one scale for each head of each batch row.

    Attributes:
        qdata: float8_e4m3fn `[batch, heads, length, head_dim]`.
        scale: float32 `[batch, heads]`, not negative.

    Raises:
        ValueError: another dtype or shape.
    """

    qdata: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if not is_plain_tensor(self.qdata) or self.qdata.dtype != FP8 or self.qdata.ndim != 4:
            raise ValueError(
                f"PerHeadFP8.qdata must be float8_e4m3fn [{LAYOUT}], got {describe(self.qdata)}. "
                "Use saccade.quantize_fp8_per_head."
            )
        scales = tuple(self.qdata.shape[:2])
        name = "PerHeadFP8.scale (one for each batch row and head)"
        check_exactly(name, self.scale, (torch.float32,), scales, self.qdata.device)

    def dequantize(self) -> Tensor:
        """qdata * scale, float32 `[batch, heads, length, head_dim]`."""
        return self.qdata.float() * self.scale[..., None, None]


def quantize_fp8_per_head(x: Tensor) -> PerHeadFP8:
    """`x` `[batch, heads, length, head_dim]` in fp8: scale = largest magnitude of a head / 448.

    e4m3 has three mantissa bits, so a value is off by a sixteenth at most; values below 2^-15 of
    the largest of their head keep fewer bits, those below 2^-19 become 0.  Keys with outlier
    channels lose least after `hadamard_transform` of queries and keys.

    Args:
        x: float32, bfloat16 or float16; detached, no gradient flows back.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv 2209.05433).
    """
    check_tensor("x", x, FLOATS, LAYOUT)
    if x.numel() == 0:  # no largest value of nothing
        ones = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        return PerHeadFP8(x.detach().to(FP8), ones)
    largest = x.detach().abs().amax((2, 3)).float()
    # A head of zeros has any scale; so has a head so small that its scale would not be normal.
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return PerHeadFP8((x.detach().float() / scale[..., None, None]).to(FP8), scale)


def qdata_of(x: Tensor | PerHeadFP8) -> Tensor:
    """The tensor that stores `x`: its qdata where it is PerHeadFP8."""
    return x.qdata if isinstance(x, PerHeadFP8) else x


def scale_of(x: Tensor | PerHeadFP8) -> Tensor:
    """Scales float32 `[batch, heads]` of `x`; ones for a plain tensor."""
    if isinstance(x, PerHeadFP8):
        return x.scale
    return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
