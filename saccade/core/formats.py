"""The storage formats of quantised keys and values: one definition of pack and unpack.

Codes are unsigned, `x = code * scale + offset`, with scale and offset in float16 (KIVI, arXiv
2402.02750: keys have outlier channels, values do not):

    keys     one scale per channel and per group of `group` consecutive tokens
    values   one scale per token and per group of `group` consecutive channels

Eight-bit codes may be floating-point numbers instead (`float8_e4m3fn`, -448 to 448), around an
offset in the middle of their group; whatever reads codes sees it by their dtype.

Four-bit codes share a byte by halves of the head: byte d holds channel d in its low nibble and
channel d + dim/2 in its high nibble, so that a kernel unpacks two contiguous half-heads with a
mask and a shift.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor


class QuantizedTensor(NamedTuple):
    """Quantised tensor: uint8 or float8_e4m3fn codes, float16 scale and offset of their group."""

    qdata: Tensor
    scale: Tensor
    offset: Tensor


FP8: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(FP8).max


def pack(qdata: Tensor, bits: int) -> Tensor:
    """Codes `[..., dim]` below 2**bits as bytes: `[..., dim]` (8 bits) or `[..., dim / 2]` (4)."""
    if bits == 8:
        return qdata if qdata.dtype == FP8 else qdata.to(torch.uint8)
    low, high = qdata.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: codes `[..., dim]`."""
    if bits == 8:
        return packed
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _encode(x: Tensor, dim: int, bits: int) -> QuantizedTensor:
    """Affine codes of x with one scale and offset along `dim` (kept with size 1)."""
    low, high = x.amin(dim, keepdim=True).float(), x.amax(dim, keepdim=True).float()
    # The stored float16 numbers are the ones that decoding uses, so round them before encoding.
    offset = low.half()
    scale = ((high - offset.float()) / (2**bits - 1)).clamp_min(2.0**-24).half()
    qdata = ((x.float() - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return QuantizedTensor(qdata, scale, offset)


def _encode_floats(x: Tensor, dim: int) -> QuantizedTensor:
    """fp8 codes of x with one scale and offset along `dim`: the middle is 0, the ends +-448."""
    low, high = x.amin(dim, keepdim=True).float(), x.amax(dim, keepdim=True).float()
    offset = ((low + high) / 2).half()
    reach = torch.maximum(high - offset.float(), offset.float() - low)
    scale = (reach / LARGEST).clamp_min(2.0**-24).half()
    qdata = (x.float() - offset.float()) / scale.float()
    return QuantizedTensor(qdata.clamp(-LARGEST, LARGEST).to(FP8), scale, offset)


def quantize_keys(k: Tensor, *, bits: int, group: int, fp8: bool = False) -> QuantizedTensor:
    """Keys `[B, H, N, D]` -> codes `[B, H, N, D(/2)]`, scales `[B, H, N/group, D]`.

    N is a multiple of group; `fp8` makes eight-bit codes floating-point numbers.
    """
    batch, heads, length, dim = k.shape
    grouped = k.reshape(batch, heads, length // group, group, dim)
    coded = _encode_floats(grouped, 3) if fp8 else _encode(grouped, 3, bits)
    qdata = pack(coded.qdata.reshape(batch, heads, length, dim), bits)
    return QuantizedTensor(qdata, coded.scale.squeeze(3), coded.offset.squeeze(3))


def quantize_values(v: Tensor, *, bits: int, group: int, fp8: bool = False) -> QuantizedTensor:
    """Values `[B, H, N, D]` -> codes `[B, H, N, D(/2)]`, scales `[B, H, N, D/group]`."""
    batch, heads, length, dim = v.shape
    grouped = v.reshape(batch, heads, length, dim // group, group)
    coded = _encode_floats(grouped, 4) if fp8 else _encode(grouped, 4, bits)
    qdata = pack(coded.qdata.reshape(batch, heads, length, dim), bits)
    return QuantizedTensor(qdata, coded.scale.squeeze(4), coded.offset.squeeze(4))


def dequantize_keys(coded: QuantizedTensor, *, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_keys` to rounding: `[B, H, N, D]` in `dtype`."""
    qdata = unpack(coded.qdata, bits).float()
    scale = coded.scale.float().repeat_interleave(group, dim=2)
    offset = coded.offset.float().repeat_interleave(group, dim=2)
    return (qdata * scale + offset).to(dtype)


def dequantize_values(coded: QuantizedTensor, *, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_values` to rounding: `[B, H, N, D]` in `dtype`."""
    qdata = unpack(coded.qdata, bits).float()
    grouped = qdata.unflatten(-1, (coded.scale.shape[-1], -1))
    x = grouped * coded.scale.float().unsqueeze(-1) + coded.offset.float().unsqueeze(-1)
    return x.flatten(-2).to(dtype)
