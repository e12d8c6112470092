"""The storage formats of quantised keys and values: one definition of pack and unpack.

Codes are unsigned, `x = code * scale + offset`, with scale and offset in float16 (KIVI, arXiv
2402.02750: keys have outlier channels, values do not):

    keys     one scale per channel and per group of `group` consecutive tokens
    values   one scale per token and per group of `group` consecutive channels

Four-bit codes share a byte by halves of the head: byte d holds channel d in its low nibble and
channel d + dim/2 in its high nibble, so that a kernel unpacks two contiguous half-heads with a
mask and a shift.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Quantised tensor: uint8 codes with float16 scale and offset broadcast over their group."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., dim]` below 2**bits as bytes: `[..., dim]` (8 bits) or `[..., dim / 2]` (4)."""
    if bits == 8:
        return codes.to(torch.uint8)
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 codes `[..., dim]`."""
    if bits == 8:
        return packed
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _encode(x: Tensor, dim: int, bits: int) -> Codes:
    """Affine codes of x with one scale and offset along `dim` (kept with size 1)."""
    low, high = x.amin(dim, keepdim=True).float(), x.amax(dim, keepdim=True).float()
    # The stored float16 numbers are the ones that decoding uses, so round them before encoding.
    offset = low.half()
    scale = ((high - offset.float()) / (2**bits - 1)).clamp_min(2.0**-24).half()
    codes = ((x.float() - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return Codes(codes, scale, offset)


def quantize_keys(k: Tensor, *, bits: int, group: int) -> Codes:
    """Keys `[B, H, N, D]` -> codes `[B, H, N, D(/2)]`, scales `[B, H, N/group, D]`.

    N is a multiple of group.
    """
    batch, heads, length, dim = k.shape
    coded = _encode(k.reshape(batch, heads, length // group, group, dim), 3, bits)
    codes = pack(coded.codes.reshape(batch, heads, length, dim), bits)
    return Codes(codes, coded.scale.squeeze(3), coded.offset.squeeze(3))


def quantize_values(v: Tensor, *, bits: int, group: int) -> Codes:
    """Values `[B, H, N, D]` -> codes `[B, H, N, D(/2)]`, scales `[B, H, N, D/group]`."""
    batch, heads, length, dim = v.shape
    coded = _encode(v.reshape(batch, heads, length, dim // group, group), 4, bits)
    codes = pack(coded.codes.reshape(batch, heads, length, dim), bits)
    return Codes(codes, coded.scale.squeeze(4), coded.offset.squeeze(4))


def dequantize_keys(coded: Codes, *, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_keys` to rounding: `[B, H, N, D]` in `dtype`."""
    codes = unpack(coded.codes, bits).float()
    scale = coded.scale.float().repeat_interleave(group, dim=2)
    offset = coded.offset.float().repeat_interleave(group, dim=2)
    return (codes * scale + offset).to(dtype)


def dequantize_values(coded: Codes, *, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_values` to rounding: `[B, H, N, D]` in `dtype`."""
    codes = unpack(coded.codes, bits).float()
    grouped = codes.unflatten(-1, (coded.scale.shape[-1], -1))
    x = grouped * coded.scale.float().unsqueeze(-1) + coded.offset.float().unsqueeze(-1)
    return x.flatten(-2).to(dtype)
