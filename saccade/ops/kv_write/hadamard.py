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

FEW_ROWS = 4096  # up to here a program for each row is faster than products of tiles
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


@cache
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix without its factor: 1 and -1, which every dtype holds."""
    return (_matrix(size, torch.float64, device) * size**0.5).round().to(dtype)


def _by_kernel(x: Tensor) -> bool:
    """Whether a kernel computes it: rows a power of two long, without gradient.

    Many rows are products on tensor cores, exact in 16 bits; float32 ones are PyTorch's product.
    """
    dim = x.shape[-1]
    one_block = 2 <= dim <= MAX_DIM and block_of(dim) == dim
    halves = x.dtype in (torch.bfloat16, torch.float16) and dim >= 16
    rows = 0 < x.numel() and (halves or x.numel() <= FEW_ROWS * dim)
    plain = not x.requires_grad and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    return one_block and rows and plain and has_triton(x.device)


def hadamard_transform(x: Tensor) -> Tensor:
    """Transform the last dimension of `x` `[..., dim]`; applying it twice gives x back."""
    if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        # `[B, H, L, D]` in rows of tokens, as models have it: its rows need no copy.
        return hadamard_transform(x.transpose(1, 2)).transpose(1, 2)
    block = block_of(x.shape[-1])
    if _by_kernel(x):
        from saccade.ops.kv_write.hadamard_kernel import hadamard_many_rows, hadamard_rows

        if x.numel() <= FEW_ROWS * block:
            return hadamard_rows(x)
        return hadamard_many_rows(x, _signs(min(block, 128), x.dtype, x.device))
    compute = torch.promote_types(x.dtype, torch.float32)
    product = x.to(compute).reshape(-1, block) @ _matrix(block, compute, x.device)
    return product.view(x.shape).to(x.dtype)


def clear_cache() -> None:
    """Drop the cached matrices."""
    _matrix.cache_clear()
    _signs.cache_clear()
