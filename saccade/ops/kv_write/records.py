"""Arguments of a write into a cache: slots, and RoPE that is still to be applied."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PendingRope(NamedTuple):
    """RoPE still to be applied by halves: (a, b) -> (a cos - b sin, b cos + a sin).

    Attributes:
        q: queries `[B, H, t, D]`, rotated together with the keys.
        cos, sin: `[B | 1, t, D]`, each half of D holding the same values, as in transformers.
    """

    q: Tensor
    cos: Tensor
    sin: Tensor


class KVSlots(NamedTuple):
    """Where new tokens are written.

    Attributes:
        k, v: storage `[B, Hkv, slots, D]` and `[.., Dv]`.
        at: int64 `[B]`, the index of the first new token.
        origin: int64 `[1]`, the index of slot 0; None for 0.
        hadamard: apply the Hadamard transform to keys and values before storing.
    """

    k: Tensor
    v: Tensor
    at: Tensor
    origin: Tensor | None = None
    hadamard: bool = False
