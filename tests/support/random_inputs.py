"""Random tensors of tests: one seed, one way to draw them."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 2205  # of every test (tests/conftest.py)


def generator(seed: int) -> torch.Generator:
    """A source of its own for inputs that must not depend on what was drawn before."""
    return torch.Generator().manual_seed(seed)


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 1.0
) -> Tensor:
    """Normal numbers, drawn in float32 and rounded to `dtype`."""
    return (torch.randn(shape, device=device) * scale).to(dtype)


def qkv(
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 6,
    k_len: int = 6,
    dim: int = 16,
    *,
    value_dim: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[batch, heads, q_len, dim]`, keys and values `[batch, kv_heads, k_len, ..]`."""
    shapes = (
        (batch, heads, q_len, dim),
        (batch, kv_heads, k_len, dim),
        (batch, kv_heads, k_len, value_dim or dim),
    )
    q, k, v = (normal(*shape, dtype=dtype, device=device) for shape in shapes)
    return q, k, v


def nan(*shape: int) -> Tensor:
    """Storage filled with NaN, which shows a read before the write."""
    return torch.full(shape, torch.nan)
