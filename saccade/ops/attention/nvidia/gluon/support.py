"""What Gluon kernels for Hopper do not compute or cannot load, each in a sentence.

Loaded on any machine, by the modules that say which calls a kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.launching import tma_aligned


def score_refusal(call: AttentionCall) -> str | None:
    """What no Gluon kernel but that of prefill computes, whatever its keys are."""
    if call.softcap is not None or call.alibi_slopes is not None:
        return "with few queries and in fp8 it supports no softcap and no alibi_slopes"
    return scale_refusal(call)


def scale_refusal(call: AttentionCall) -> str | None:
    """Why the largest product is not the largest score, or None."""
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    return None


def layout_refusal(
    tensors: tuple[Tensor, Tensor, Tensor], dims: Sequence[int], *, equal: bool = True
) -> str | None:
    """Why queries, keys and values `[B, H, L, D]` cannot be loaded by tiles, or None.

    Args:
        dims: head dimensions of the kernel; `equal`: that of the values has to be that of the keys.
    """
    for x in tensors:
        if x.shape[3] not in dims:
            return f"head_dim {x.shape[3]} is not one of {_listed(dims)}"
        if x.shape[3] % 8:
            return f"TMA needs rows of 16 n bytes, head_dim {x.shape[3]} is no multiple of 8"
        if equal and x.shape[3] != tensors[0].shape[3]:
            return f"value_dim {x.shape[3]} is not head_dim {tensors[0].shape[3]}"
        if not tma_aligned(x):
            return "TMA needs rows at distinct multiples of 16 bytes"
    if any(x.numel() == 0 for x in tensors):
        return "there are no queries or no keys"
    return None


def _listed(dims: Sequence[int]) -> str:
    if isinstance(dims, range):
        return f"{dims[0]} to {dims[-1]}"
    return ", ".join(map(str, dims))
