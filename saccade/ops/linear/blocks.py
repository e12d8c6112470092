"""GGUF's blocks as packed weights, and rounding to packed weights of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.linear.packed import PackedWeight, pack

# Bytes and numbers of a block.
SIZES = {
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
}


def packed_blocks(kind: str, raw: Tensor) -> PackedWeight | None:
    """A matrix of a GGUF file as it is: raw uint8 `[rows, bytes of a row]`, which is only read.

    None where a kind has no packed form, or where a product of scales leaves float16's range.
    """
    if kind not in SIZES:
        return None
    block_bytes, block_size = SIZES[kind]
    if raw.ndim != 2 or raw.dtype != torch.uint8 or raw.shape[1] % block_bytes:
        raise ValueError(
            f"raw must be uint8 [rows, whole blocks of {block_bytes} bytes] for {kind}, "
            f"got {raw.dtype} {list(raw.shape)}."
        )
    n = raw.shape[0]
    blocks = raw.reshape(n, -1, block_bytes)
    q, scale, low, bits = _READERS[kind](blocks)
    width = blocks.shape[1] * block_size
    scale = scale.reshape(n, -1).half()
    low = None if low is None else low.reshape(n, -1).half()
    if not scale.isfinite().all() or (low is not None and not low.isfinite().all()):
        return None
    return pack(q.reshape(n, width), scale, low, bits=bits)


def quantized(weight: Tensor, bits: int) -> PackedWeight:
    """A matrix `[out, in]` rounded to nearest in groups of 32: 8 bits, or 4 with a minimum."""
    if bits not in (4, 8) or weight.ndim != 2 or weight.shape[1] % 32:
        raise ValueError(
            f"quantized needs 4 or 8 bits and a matrix whose rows are multiples of 32, "
            f"got {bits} bits and {list(weight.shape)}."
        )
    groups = weight.detach().float().reshape(weight.shape[0], -1, 32)
    if bits == 8:
        scale = (groups.abs().amax(-1) / 127).half()
        q = _divided(groups, scale).round().clamp(-127, 127).to(torch.int8)
        return pack(q.reshape(weight.shape), scale, None, bits=8)
    low = groups.amin(-1).half()
    scale = ((groups.amax(-1) - low.float()) / 15).half()
    q = _divided(groups - low.float().unsqueeze(-1), scale).round().clamp(0, 15)
    return pack(q.to(torch.uint8).reshape(weight.shape), scale, low, bits=4)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide == 0, 0.0, x / wide)


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


def _q4_0(b: Tensor):
    return _nibbles(b[..., 2:]), _half(b, 0), None, 4


def _q4_1(b: Tensor):
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2), 4


def _q5_0(b: Tensor):
    q = (_nibbles(b[..., 6:]) | _fifth(b[..., 2:6])).to(torch.int8) - 16
    return q, _half(b, 0), None, 8


def _q5_1(b: Tensor):
    q = (_nibbles(b[..., 8:]) | _fifth(b[..., 4:8])).to(torch.int8)
    return q, _half(b, 0), _half(b, 2), 8


def _q8_0(b: Tensor):
    return b[..., 2:].contiguous().view(torch.int8), _half(b, 0), None, 8


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight sub-blocks of Q4_K and Q5_K."""
    d, m, rest = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((d & 63, (rest & 15) | (d >> 2 & 48)), -1)
    low = torch.cat((m & 63, (rest >> 4) | (m >> 2 & 48)), -1)
    return _half(b, 0) * scale.float(), -(_half(b, 2) * low.float())


def _q4_k(b: Tensor):
    q = _nibbles(b[..., 16:].unflatten(-1, (4, 32)))
    return q, *_k_scales(b), 4


def _q5_k(b: Tensor):
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    high = (b[..., 16:48].unsqueeze(-2) >> shifts & 1) << 4
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return (low | high).to(torch.int8), *_k_scales(b), 8


def _q6_k(b: Tensor):
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3) << 4
    scale = b[..., 192:208].contiguous().view(torch.int8).float() * _half(b, 208)
    return (low | high).to(torch.int8) - 32, scale, None, 8


_READERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
