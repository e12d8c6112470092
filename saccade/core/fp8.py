"""PerHeadFP8: eight-bit floating-point numbers with one scale a head, x = qdata * scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.formats import FP8, LARGEST


@dataclass(frozen=True, slots=True)
class PerHeadFP8:
    """fp8 queries, keys or values: x = qdata * scale, one scale for each head of each row.

    Attributes:
        codes: float8_e4m3fn `[batch, heads, length, head_dim]`.
        scale: float32 `[batch, heads]`, not negative.

    Raises:
        ValueError: another dtype or shape.
    """

    qdata: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.qdata.dtype != FP8 or self.qdata.ndim != 4:
            raise ValueError(
                "PerHeadFP8.qdata must be float8_e4m3fn [batch, heads, length, head_dim], "
                f"got {self.qdata.dtype} {list(self.qdata.shape)}. Use saccade.quantize_fp8_per_head."
            )
        if self.scale.dtype != torch.float32 or self.scale.shape != self.qdata.shape[:2]:
            raise ValueError(
                f"PerHeadFP8.scale must be float32 {list(self.qdata.shape[:2])}, one number for every "
                f"row of the batch and head, got {self.scale.dtype} {list(self.scale.shape)}."
            )

    def numbers(self) -> Tensor:
        """What the codes stand for, float32 `[batch, heads, length, head_dim]`."""
        return self.qdata.float() * self.scale[..., None, None]


def quantize_fp8_per_head(x: Tensor) -> PerHeadFP8:
    """`x` `[batch, heads, length, head_dim]` in fp8: scale = largest magnitude of a head / 448.

    Numbers keep three bits behind the first one, so each is off by a sixteenth at most; those below
    2^-15 of the largest of their head keep fewer, those below 2^-19 become 0.  Keys with outlier
    channels lose least when queries and keys are Hadamard-rotated before.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv 2209.05433).
    """
    largest = x.detach().abs().amax((2, 3)).float()
    # A head of zeros has any scale; so has a head so small that its scale would not be normal.
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return PerHeadFP8((x.detach().float() / scale[..., None, None]).to(FP8), scale)


def qdata_of(x: Tensor | PerHeadFP8) -> Tensor:
    """The tensor that holds `x`: its codes where it is scaled."""
    return x.qdata if isinstance(x, PerHeadFP8) else x


def scale_of(x: Tensor | PerHeadFP8) -> Tensor:
    """Scales `[batch, heads]` of `x`: ones where it comes without."""
    if isinstance(x, PerHeadFP8):
        return x.scale
    return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
