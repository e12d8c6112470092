"""Storing the tokens of a decoding step: RoPE, Hadamard transform and write, in one kernel on GPUs.

    q, k -> RoPE -> q out, k -> (Hadamard) -> cache at the cursor;  v -> (Hadamard) -> cache

The index to write at is a tensor, so nothing waits for the host and a CUDA graph can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu.support import has_triton
from saccade.ops.kv_write.hadamard import block_of, hadamard_transform
from saccade.ops.kv_write.records import KVSlots, PendingRope
from saccade.rope.rotary import apply


def append(slots: KVSlots, k: Tensor, v: Tensor, rope: PendingRope | None = None) -> Tensor | None:
    """Write keys `[B, Hkv, t, D]` and values into their slots; the rotated queries, or None.

    The cursor has the same value in every row.
    """
    if has_triton(k.device) and _fits_kernel(slots, k, v, rope):
        from saccade.ops.kv_write.append_kernel import append_by_kernel

        return append_by_kernel(slots, k, v, rope)
    q = None
    if rope is not None:
        q, k = apply_pending(rope.q, rope), apply_pending(k, rope)
    if slots.hadamard:
        k, v = hadamard_transform(k), hadamard_transform(v)
    first = slots.at[:1] if slots.origin is None else slots.at[:1] - slots.origin
    index = first + torch.arange(k.shape[2], device=k.device)
    slots.k.index_copy_(2, index, k.to(slots.k.dtype))
    slots.v.index_copy_(2, index, v.to(slots.v.dtype))
    return q


def apply_rope_qk(k: Tensor, rope: PendingRope) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys `[B, H, t, D]`, by one kernel on GPUs."""
    if has_triton(k.device) and _fits_kernel(None, k, k, rope):
        from saccade.ops.kv_write.append_kernel import append_by_kernel

        out = torch.empty_like(k)
        start = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        q = append_by_kernel(KVSlots(out, out, start), k, None, rope)
        assert q is not None
        return q, out
    return apply_pending(rope.q, rope), apply_pending(k, rope)


def apply_pending(x: Tensor, rope: PendingRope) -> Tensor:
    """`x` `[B, H, t, D]` rotated by the tables of `rope` (`saccade.rope.rotary.apply`)."""
    pairs = rope.cos.shape[-1] // 2
    return apply(x, rope.cos[..., :pairs], rope.sin[..., :pairs])


def _fits_kernel(slots: KVSlots | None, k: Tensor, v: Tensor, rope: PendingRope | None) -> bool:
    """Whether the kernel computes it: even head dimensions, Hadamard blocks of full heads."""
    dims = k.shape[3], v.shape[3]
    if any(dim % 2 for dim in dims) or (rope is not None and rope.cos.shape[-1] != dims[0]):
        return False
    return slots is None or not slots.hadamard or all(block_of(dim) == dim for dim in dims)
