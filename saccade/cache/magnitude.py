"""Which numbers quantized caches can hold, whose scales and offsets are float16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.core.formats import LARGEST
from saccade.ops.planning import planning

SMALLEST = 2.0**-14
"""Where the largest number is smaller, the smallest step of float16 would be too coarse for it."""


def check_magnitude(k: Tensor, v: Tensor, *, least: bool = True) -> None:
    """Raise ValueError unless float16 scales can hold these keys and values; NaN is no matter.

    Args:
        least: whether the largest number must also be large enough.
    """
    for name, x in (("keys", k), ("values", v)):
        if x.is_meta or planning() or not x.numel():
            continue
        largest = _largest(x)
        if largest > LARGEST or (least and 0 < largest < SMALLEST):
            raise ValueError(
                f"a quantized cache takes {name} of magnitudes between {SMALLEST:.2g} and "
                f"{LARGEST:.0f}, since its scales are float16, got {largest:.3g}. Leave out "
                "type_k and type_v."
            )


def _largest(x: Tensor) -> float:
    """The largest magnitude, NaN left out."""
    found = float(torch.linalg.vector_norm(x, torch.inf))
    if math.isnan(found):
        found = float(x.abs().nan_to_num(0.0, posinf=torch.inf).amax())
    return found
