"""Scaled: eight-bit floating-point numbers with one scale a head, x = codes * scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.formats import FP8, LARGEST


@dataclass(frozen=True, slots=True)
class Scaled:
    """fp8 queries, keys or values: x = codes * scale, one scale for each head of each row.

    Attributes:
        codes: float8_e4m3fn `[batch, heads, length, head_dim]`.
        scale: float32 `[batch, heads]`, not negative.

    Raises:
        ValueError: another dtype or shape.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != FP8 or self.codes.ndim != 4:
            raise ValueError(
                "Scaled.codes must be float8_e4m3fn [batch, heads, length, head_dim], "
                f"got {self.codes.dtype} {list(self.codes.shape)}. Use saccade.quantize_heads."
            )
        if self.scale.dtype != torch.float32 or self.scale.shape != self.codes.shape[:2]:
            raise ValueError(
                f"Scaled.scale must be float32 {list(self.codes.shape[:2])}, one number for every "
                f"row of the batch and head, got {self.scale.dtype} {list(self.scale.shape)}."
            )

    def numbers(self) -> Tensor:
        """What the codes stand for, float32 `[batch, heads, length, head_dim]`."""
        return self.codes.float() * self.scale[..., None, None]


def quantize_heads(x: Tensor) -> Scaled:
    """`x` `[batch, heads, length, head_dim]` in fp8: scale = largest magnitude of a head / 448.

    Numbers keep three bits behind the first one, so each is off by a sixteenth at most; those below
    2^-15 of the largest of their head keep fewer, those below 2^-19 become 0.  Keys with outlier
    channels lose least when queries and keys are Hadamard-rotated before.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv 2209.05433).
    """
    largest = x.detach().abs().amax((2, 3)).float()
    # A head of zeros has any scale; so has a head so small that its scale would not be normal.
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return Scaled((x.detach().float() / scale[..., None, None]).to(FP8), scale)


def codes_of(x: Tensor | Scaled) -> Tensor:
    """The tensor that holds `x`: its codes where it is scaled."""
    return x.codes if isinstance(x, Scaled) else x


def scale_of(x: Tensor | Scaled) -> Tensor:
    """Scales `[batch, heads]` of `x`: ones where it comes without."""
    if isinstance(x, Scaled):
        return x.scale
    return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
