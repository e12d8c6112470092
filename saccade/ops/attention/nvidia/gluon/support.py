"""What Gluon kernels for Hopper do not compute or cannot fetch, each in a sentence.

Loaded on any machine, by the modules that say which calls a kernel takes.
"""

from __future__ import annotations

from torch import Tensor

from saccade.ops.attention.call import AttentionCall


def score_refusal(call: AttentionCall) -> str | None:
    """What none of the Gluon kernels computes, whatever its keys are."""
    if call.softcap is not None or call.alibi_slopes is not None:
        return "it knows no softcap and no alibi_slopes"
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    return None


def layout_refusal(tensors: tuple[Tensor, Tensor, Tensor], dims: tuple[int, ...]) -> str | None:
    """Why queries, keys and values `[B, H, L, D]` cannot be fetched by tiles, or None."""
    for x in tensors:
        if x.shape[3] not in dims or x.shape[3] != tensors[0].shape[3]:
            return f"head_dim {x.shape[3]} is not one of {', '.join(map(str, dims))}"
        if not copyable(x):
            return "TMA needs rows at distinct multiples of 16 bytes"
    if any(x.numel() == 0 for x in tensors):
        return "there are no queries or no keys"
    return None


def copyable(x: Tensor) -> bool:
    """Unit last stride, and every other step a positive multiple of 16 bytes."""
    return in_steps(x, 16) and all(x.stride(i) > 0 for i in range(3) if x.shape[i] > 1)


def in_steps(x: Tensor, step: int) -> bool:
    """Unit last stride, and all others multiples of `step` bytes."""
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return x.stride(3) == 1 and x.data_ptr() % step == 0 and all(s % step == 0 for s in steps)
