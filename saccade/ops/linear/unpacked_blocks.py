"""GGUF's blocks unpacked by PyTorch, where the C++ kernels are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

_Unpacked: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


def read(kind: str, blocks: Tensor) -> _Unpacked:
    """q `[rows, in]`, scale and minimum `[rows, groups]` of blocks `[rows, blocks, bytes]`."""
    rows = blocks.shape[0]
    q, scale, low = _READERS[kind](blocks)
    low = None if low is None else low.reshape(rows, -1).half()
    return q.reshape(rows, -1), scale.reshape(rows, -1).half(), low


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at an offset of each block, as float32 `[.., 1]`."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(x: Tensor) -> Tensor:
    """Low nibbles, then high ones, of each run of bytes."""
    return torch.cat((x & 15, x >> 4), -1)


def _fifth(x: Tensor) -> Tensor:
    """32 bits of each four bytes, as 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((x.unsqueeze(-1) >> shifts & 1) << 4).flatten(-2)


def _q4_0(b: Tensor) -> _Unpacked:
    return _nibbles(b[..., 2:]), _half(b, 0), None


def _q4_1(b: Tensor) -> _Unpacked:
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2)


def _q5_0(b: Tensor) -> _Unpacked:
    q = (_nibbles(b[..., 6:]) | _fifth(b[..., 2:6])) + 16  # 32 is taken off, not 16
    return q, _half(b, 0), None


def _q5_1(b: Tensor) -> _Unpacked:
    return _nibbles(b[..., 8:]) | _fifth(b[..., 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor) -> _Unpacked:
    return b[..., 2:].contiguous().view(torch.int8), _half(b, 0), None


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight sub-blocks of Q4_K and Q5_K."""
    d, m, rest = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((d & 63, (rest & 15) | (d >> 2 & 48)), -1)
    low = torch.cat((m & 63, (rest >> 4) | (m >> 2 & 48)), -1)
    return _half(b, 0) * scale.float(), -(_half(b, 2) * low.float())


def _q4_k(b: Tensor) -> _Unpacked:
    q = _nibbles(b[..., 16:].unflatten(-1, (4, 32)))
    return q, *_k_scales(b)


def _q5_k(b: Tensor) -> _Unpacked:
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    high = (b[..., 16:48].unsqueeze(-2) >> shifts & 1) << 4
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return low | high, *_k_scales(b)


def _q6_k(b: Tensor) -> _Unpacked:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3) << 4
    scale = b[..., 192:208].contiguous().view(torch.int8).float() * _half(b, 208)
    return low | high, scale, None


_READERS: dict[str, Callable[[Tensor], _Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
