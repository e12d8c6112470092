"""The orthonormal Walsh-Hadamard transform that spreads outlier channels before quantizing.

Attention is unchanged when q and k are both multiplied by one orthonormal matrix, and when v is
multiplied by one and the output by its inverse (QuaRot, arXiv 2404.00456).  The Hadamard matrix is
symmetric, so the transform is its own inverse.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from saccade.ops.gpu.support import has_triton

MAX_ROWS = 4096  # for more rows a matrix product is faster than the kernel
MAX_DIM = 512


def block_of(dim: int) -> int:
    """Largest power of two that divides `dim`: heads are transformed in blocks of this size."""
    return dim & -dim


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return (h / size**0.5).to(device=device, dtype=dtype)


def _by_kernel(x: Tensor) -> bool:
    """Whether the kernel computes it: a few rows, a power of two long, without gradient."""
    dim = x.shape[-1]
    one_block = 2 <= dim <= MAX_DIM and block_of(dim) == dim
    few = 0 < x.numel() <= MAX_ROWS * dim
    plain = not x.requires_grad and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    return one_block and few and plain and has_triton(x.device)


def hadamard_transform(x: Tensor) -> Tensor:
    """Transform the last dimension of `x` `[..., dim]`; applying it twice gives x back."""
    block = block_of(x.shape[-1])
    if _by_kernel(x):
        from saccade.ops.kv_write.hadamard_kernel import hadamard_rows

        return hadamard_rows(x)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = _matrix(block, compute, x.device)
    return (x.to(compute).unflatten(-1, (-1, block)) @ h).flatten(-2).to(x.dtype)


def clear_cache() -> None:
    """Drop the cached matrices."""
    _matrix.cache_clear()
