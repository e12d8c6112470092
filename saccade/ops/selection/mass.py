"""What blocks of keys receive of the attention: exactly, from the scores of all keys."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 22  # scores that exist at a time


def block_mass(
    q: Tensor, k: Tensor, q_offset: int | Tensor, block: int, real: Tensor | None = None
) -> Tensor:
    """Sums of the softmax weights `softmax(q . k / sqrt(D))` of the keys of each block.

    A piece of the keys is scored at a time, and what is kept of it is a LSE for each block: the
    weights of blocks are a softmax of those.

    Args:
        q: `[B, H, Lq, D]`; query i sees the keys at positions up to `q_offset + i`.
        k: `[B, Hkv, Lk, D]`, by position.
        q_offset: position of the first query; in a captured step an int64 scalar on the device.
        block: tokens in a block of keys.
        real: bool `[B, Hkv | 1, Lk]`, False where there is no key; None: all are keys.

    Returns:
        Float32 `[B, Hkv, Lq, blocks]`, the sum over the query heads that share a KV head.
    """
    group, length, num_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    x = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)
    at = q_offset + torch.arange(length, device=q.device).repeat(group)[:, None]
    every = not isinstance(q_offset, int) or length > 1 or num_keys > q_offset + 1
    step = max(1, PIECE // (x.shape[0] * x.shape[1] * x.shape[2] * block)) * block
    found = list[Tensor]()
    for start in range(0, num_keys, step):
        part = k[:, :, start : start + step].to(q.dtype)
        scores = products(x, part) * q.shape[3] ** -0.5
        if every:
            places = torch.arange(start, start + part.shape[2], device=q.device)
            scores.masked_fill_(places > at, -torch.inf)
        if real is not None:
            scores.masked_fill_(~real[:, :, None, start : start + step], -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, -scores.shape[3] % block), value=-torch.inf)
        found.append(scores.unflatten(3, (-1, block)).logsumexp(-1))
    mass = torch.cat(found, -1).softmax(-1).nan_to_num(0)
    return mass.unflatten(2, (group, length)).sum(2)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Scores `q @ k.mT` as contiguous float32 `[B, Hkv, rows, keys]`."""
    if q.is_cpu and q.dtype != torch.float32:  # the other way round PyTorch copies the keys
        return (k @ q.mT).mT.to(torch.float32, memory_format=torch.contiguous_format)
    return (q @ k.mT).float()
