"""The orthonormal Walsh-Hadamard rotation that spreads outlier channels before quantising.

Attention is unchanged when q and k are turned by the same orthonormal matrix, and when v is
turned and the output turned back (QuaRot, arXiv 2404.00456).  The matrix is symmetric, so the
same function turns back.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from saccade.ops.gpu.support import has_triton

FEW = 4096  # rows; a matrix product is faster for more


def block_of(dim: int) -> int:
    """Largest power of two that divides `dim`: heads are rotated in blocks of this size."""
    return dim & -dim


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return (h / size**0.5).to(device=device, dtype=dtype)


def _by_kernel(x: Tensor) -> bool:
    """Whether one small kernel does it: a few rows of a whole power of two, and no gradient."""
    whole = 2 <= x.shape[-1] <= 512 and block_of(x.shape[-1]) == x.shape[-1]
    few = 0 < x.numel() <= FEW * x.shape[-1]
    plain = not x.requires_grad and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    return whole and few and plain and has_triton(x.device)


def hadamard_transform(x: Tensor) -> Tensor:
    """Rotate the last dimension of `x` `[..., dim]`; applying it twice gives x back."""
    block = block_of(x.shape[-1])
    if _by_kernel(x):
        from saccade.ops.kv_write.append_kernel import rotate_rows

        return rotate_rows(x)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = _matrix(block, compute, x.device)
    return (x.to(compute).unflatten(-1, (-1, block)) @ h).flatten(-2).to(x.dtype)


def forget() -> None:
    """Drop the matrices that are remembered."""
    _matrix.cache_clear()
