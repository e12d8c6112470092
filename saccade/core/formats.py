"""The storage formats of quantized keys and values, and their bit packing.

Quantized values are unsigned integers, `x = qdata * scale + offset`, with scale and offset in
float16 (KIVI, arXiv 2402.02750: keys have outlier channels, values do not):

    keys     one scale per channel and per group of `group` consecutive tokens
    values   one scale per token and per group of `group` consecutive channels

Eight-bit data may be floating point instead (`float8_e4m3fn`, -448 to 448), with the offset in the
middle of the group; the dtype of `qdata` tells which of the two it is.

Two four-bit values share a byte: byte d holds channel d in its low nibble and channel d + dim/2 in
its high nibble, so that a kernel unpacks two contiguous half-heads with a mask and a shift.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor


class QuantizedTensor(NamedTuple):
    """A quantized tensor, `x = qdata * scale + offset`.

    Attributes:
        qdata: uint8 (8 bits, or two 4-bit values a byte) or float8_e4m3fn.
        scale, offset: float16, one for each group; see the module for the groups.
    """

    qdata: Tensor
    scale: Tensor
    offset: Tensor


FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = torch.finfo(FP8).max
"""Largest finite float8_e4m3fn, 448."""


def pack(qdata: Tensor, bits: int) -> Tensor:
    """Integers `[..., dim]` below 2**bits as bytes `[..., dim]` (8 bits), `[..., dim / 2]` (4)."""
    if bits == 8:
        return qdata if qdata.dtype == FP8 else qdata.to(torch.uint8)
    low, high = qdata.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: one value a channel, `[..., dim]`."""
    if bits == 8:
        return packed
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _quantize_integers(x: Tensor, dim: int, bits: int) -> QuantizedTensor:
    """Affine integers of x with one scale and offset along `dim` (kept with size 1)."""
    low, high = x.amin(dim, keepdim=True).float(), x.amax(dim, keepdim=True).float()
    # Dequantization uses the stored float16 scale and offset, so round them before quantizing.
    offset = low.half()
    scale = ((high - offset.float()) / (2**bits - 1)).clamp_min(2.0**-24).half()
    qdata = ((x.float() - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return QuantizedTensor(qdata, scale, offset)


def _quantize_fp8(x: Tensor, dim: int) -> QuantizedTensor:
    """fp8 values of x with one scale and offset along `dim`: the middle is 0, the ends +-448."""
    low, high = x.amin(dim, keepdim=True).float(), x.amax(dim, keepdim=True).float()
    offset = ((low + high) / 2).half()
    largest = torch.maximum(high - offset.float(), offset.float() - low)
    scale = (largest / FP8_MAX).clamp_min(2.0**-24).half()
    qdata = (x.float() - offset.float()) / scale.float()
    return QuantizedTensor(qdata.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale, offset)


def quantize_keys(k: Tensor, *, bits: int, group: int, fp8: bool = False) -> QuantizedTensor:
    """Keys `[B, H, N, D]` -> qdata `[B, H, N, D(/2)]`, scale and offset `[B, H, N/group, D]`.

    Args:
        k: keys; N is a multiple of `group`.
        bits: 4 or 8.
        group: consecutive tokens that share the scale and offset of a channel.
        fp8: eight-bit data is float8_e4m3fn instead of uint8.
    """
    batch, heads, length, dim = k.shape
    grouped = k.reshape(batch, heads, length // group, group, dim)
    quantized = _quantize_fp8(grouped, 3) if fp8 else _quantize_integers(grouped, 3, bits)
    qdata = pack(quantized.qdata.reshape(batch, heads, length, dim), bits)
    return QuantizedTensor(qdata, quantized.scale.squeeze(3), quantized.offset.squeeze(3))


def quantize_values(v: Tensor, *, bits: int, group: int, fp8: bool = False) -> QuantizedTensor:
    """Values `[B, H, N, D]` -> qdata `[B, H, N, D(/2)]`, scale and offset `[B, H, N, D/group]`.

    Args:
        v: values; D is a multiple of `group`.
        bits, fp8: as for keys.
        group: consecutive channels that share the scale and offset of a token.
    """
    batch, heads, length, dim = v.shape
    grouped = v.reshape(batch, heads, length, dim // group, group)
    quantized = _quantize_fp8(grouped, 4) if fp8 else _quantize_integers(grouped, 4, bits)
    qdata = pack(quantized.qdata.reshape(batch, heads, length, dim), bits)
    return QuantizedTensor(qdata, quantized.scale.squeeze(4), quantized.offset.squeeze(4))


def dequantize_keys(
    quantized: QuantizedTensor, *, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Inverse of `quantize_keys` to rounding: `[B, H, N, D]` in `dtype`."""
    qdata = unpack(quantized.qdata, bits).float()
    scale = quantized.scale.float().repeat_interleave(group, dim=2)
    offset = quantized.offset.float().repeat_interleave(group, dim=2)
    return (qdata * scale + offset).to(dtype)


def dequantize_values(quantized: QuantizedTensor, *, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_values` to rounding: `[B, H, N, D]` in `dtype`."""
    qdata = unpack(quantized.qdata, bits).float()
    grouped = qdata.unflatten(-1, (quantized.scale.shape[-1], -1))
    x = grouped * quantized.scale.float().unsqueeze(-1) + quantized.offset.float().unsqueeze(-1)
    return x.flatten(-2).to(dtype)
