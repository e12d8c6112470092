"""Moving keys that are already rotated, for context shift and for reuse of cached chunks.

Rotations add: a key rotated for position p and again by d is the key of position p + d.  The
magnitude of a scaling rule (`attention_factor`) is in the key already, so this second rotation has
magnitude 1.  llama.cpp multiplies again on every shift, which for YaRN with factor 4 makes old keys
14 % longer each time, moved or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.rope.rotary import apply, tables


def shift_keys(
    k: Tensor, inv_freq: Tensor, delta: int | Tensor, *, interleaved: bool = False
) -> Tensor:
    """Rotated keys k [B, H, L, D] moved by `delta` positions; same shape, dtype and length.

    Exact up to one rounding of k's dtype: apply(x, tables(p)) shifted by d is apply(x, tables(p +
    d)).  A delta of 0 returns the same values.  Roundings add up over repeated shifts of
    half-precision keys, so shift once by the sum where that is possible.

    Args:
        k: keys after `apply`, in any layout that it accepts.
        inv_freq: float64 [R/2], the very frequencies k was rotated with.  Rules that change with
            the sequence length (DynamicNTK, LongRoPE) change them: shift with the old ones.
        delta: positions to move by, negative for earlier: an int, or integers [L] or [B, L]
            (dimensions of 1 broadcast).
        interleaved: as it was for `apply`.

    Raises:
        ValueError: delta is not whole numbers or does not broadcast to the keys, or as `apply`.
    """
    steps = torch.as_tensor(delta, device=k.device)
    steps = steps[None] if steps.dim() == 0 else steps  # [L or 1] or [B or 1, L or 1]
    batch, length = k.shape[0], k.shape[-2]
    sizes = zip(reversed(steps.shape), (length, batch), strict=False)
    if steps.dim() > 2 or any(given not in (1, wanted) for given, wanted in sizes):
        raise ValueError(
            f"delta must be an int or integers of shape [{length}] or [{batch}, {length}] for "
            f"keys of shape {list(k.shape)}, got {list(steps.shape)}. Give one delta per key."
        )
    dtype = torch.promote_types(k.dtype, torch.float32)
    cos, sin = tables(inv_freq, steps, attention_factor=1.0, dtype=dtype)
    shape = (*cos.shape[:-2], length, cos.shape[-1])  # one row serves all keys of a common delta
    return apply(k, cos.expand(shape), sin.expand(shape), interleaved=interleaved)
