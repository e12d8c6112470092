"""Checks of what callers pass; each error says what was expected, what came and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.formats import FP8

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(x: object) -> str:
    """Dtype and shape of a tensor, or the type of anything else."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return type(x).__name__


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless q, k, v fit together as attention inputs."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype not in (*FLOATS, FP8):
            raise TypeError(
                f"{name} must be a floating-point tensor [batch, heads, length, head_dim], "
                f"got {describe(x)}."
            )
        if x.device != q.device:
            raise ValueError(f"q, k and v must share a device, got {q.device} and {x.device}.")
    in_fp8 = [x.dtype == FP8 for x in (q, k, v)]
    if any(in_fp8) and not all(in_fp8):
        raise TypeError(
            "q, k and v must all be float8_e4m3fn or none of them, got "
            f"{', '.join(str(x.dtype).removeprefix('torch.') for x in (q, k, v))}. "
            "Quantize all three with saccade.quantize_fp8_per_head."
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "k and v must share batch, heads and length, "
            f"got k {list(k.shape)} and v {list(v.shape)}."
        )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must share the batch, got {q.shape[0]} and {k.shape[0]}.")
    check_heads(q, k.shape[1], k.shape[3])


def check_heads(q: Tensor, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless the query heads group over the KV heads with one head_dim."""
    if q.shape[3] != head_dim:
        raise ValueError(f"q and k must share head_dim, got {q.shape[3]} and {head_dim}.")
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(
            "the query heads must be a multiple of the key/value heads, "
            f"got {q.shape[1]} and {kv_heads}."
        )


def check_optional(name: str, x: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise unless `x` is None or a tensor of that dtype and shape."""
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != dtype or tuple(x.shape) != shape:
        expected = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise ValueError(f"{name} must be {expected}, got {describe(x)}.")
