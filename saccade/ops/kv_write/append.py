"""Storing the tokens of a decoding step: turn, rotate, write, in one kernel where there is a GPU.

    q, k -> RoPE -> q out, k -> (Hadamard) -> cache at the cursor;  v -> (Hadamard) -> cache

The place to write to is a tensor, so nothing waits for the host and the launch can be captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.gpu.support import has_triton
from saccade.ops.kv_write.hadamard import block_of, hadamard_transform


class PendingRope(NamedTuple):
    """Rotary positions still to be applied: (a, b) -> (a cos - b sin, b cos + a sin) by halves.

    Attributes:
        q: queries `[B, H, t, D]` that turn together with the keys.
        cos, sin: `[B | 1, t, D]`, both halves written out as transformers does.
    """

    q: Tensor
    cos: Tensor
    sin: Tensor


class KVSlots(NamedTuple):
    """Where new tokens go.

    Attributes:
        k, v: storage `[B, Hkv, slots, D]` and `[.., Dv]`.
        at: int64 `[B]`, where the first new token lies.
        origin: int64 `[1]`, the number that slot 0 has in the count of `at`; None for 0.
        hadamard: rotate keys and values before storing.
    """

    k: Tensor
    v: Tensor
    at: Tensor
    origin: Tensor | None = None
    hadamard: bool = False


def append(slots: KVSlots, k: Tensor, v: Tensor, rope: PendingRope | None = None) -> Tensor | None:
    """Write keys `[B, Hkv, t, D]` and values into their slots; the turned queries, if any.

    The cursor is the same number in every row.
    """
    if has_triton(k.device) and _fits(slots, k, v, rope):
        from saccade.ops.kv_write.append_kernel import launch

        return launch(slots, k, v, rope)
    q = None
    if rope is not None:
        q, k = turned(rope.q, rope), turned(k, rope)
    if slots.hadamard:
        k, v = hadamard_transform(k), hadamard_transform(v)
    first = slots.at[:1] if slots.origin is None else slots.at[:1] - slots.origin
    index = first + torch.arange(k.shape[2], device=k.device)
    slots.k.index_copy_(2, index, k.to(slots.k.dtype))
    slots.v.index_copy_(2, index, v.to(slots.v.dtype))
    return q


def apply_rope_qk(k: Tensor, rope: PendingRope) -> tuple[Tensor, Tensor]:
    """Queries and keys `[B, H, t, D]` turned, by one kernel where there is a GPU."""
    if has_triton(k.device) and _fits(None, k, k, rope):
        from saccade.ops.kv_write.append_kernel import launch

        out = torch.empty_like(k)
        start = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        q = launch(KVSlots(out, out, start), k, None, rope)
        assert q is not None
        return q, out
    return turned(rope.q, rope), turned(k, rope)


def turned(x: Tensor, rope: PendingRope) -> Tensor:
    """`x` `[B, H, t, D]` turned by halves, computed in the wider type of `x` and the tables."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def _fits(slots: KVSlots | None, k: Tensor, v: Tensor, rope: PendingRope | None) -> bool:
    """What the kernel serves: even heads, and Hadamard blocks that are whole heads."""
    dims = k.shape[3], v.shape[3]
    if any(dim % 2 for dim in dims) or (rope is not None and rope.cos.shape[-1] != dims[0]):
        return False
    return slots is None or not slots.hadamard or all(block_of(dim) == dim for dim in dims)
