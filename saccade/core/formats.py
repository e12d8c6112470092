"""The storage formats of quantized keys and values, and their bit packing.

Quantized values are unsigned integers, `x = qdata * scale + offset`, with scale and offset in
float16 (KIVI, arXiv 2402.02750: keys have outlier channels, values do not):

    keys     one scale per channel and per group of `group` consecutive tokens
    values   one scale per token and per group of `group` consecutive channels

Eight-bit data may be floating point instead (`float8_e4m3fn`, -448 to 448), with the offset in the
middle of the group; the dtype of `qdata` tells which of the two it is.

A value is off by half a step of its group at most.  A step is at least 2^-24 and the numbers are at
most 65504, the ends of float16.  NaN does not change the scale and offset of its group; what is
stored in its place is some number, so whoever needs to know marks it (`cache.QuantizedCache`).

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


TINY: Final = 2.0**-24
"""The smallest step that float16 holds."""
LARGEST: Final = torch.finfo(torch.float16).max
"""The largest magnitude that can be quantized, 65504."""
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


def _bounds(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest number along `dim` (kept with size 1), float32; NaN does not count."""
    unseen = x.isnan()
    low = x.masked_fill(unseen, torch.inf).amin(dim, keepdim=True).float()
    high = x.masked_fill(unseen, -torch.inf).amax(dim, keepdim=True).float()
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _half_below(x: Tensor) -> Tensor:
    """The float16 next to float32 `x` that is not above it."""
    near = x.half()
    return near.where(near.float() <= x, (x - x.abs() * 2.0**-11 - 2.0**-25).half())


def _half_scale(x: Tensor) -> Tensor:
    """The float16 next to a step `x` >= 0 that is not below it, so that no value is cut off."""
    near = x.clamp_min(TINY).half()
    return near.where(near.float() >= x, (x + x * 2.0**-11 + 2.0**-25).half())


def _divided(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once on every device.

    On a GPU PyTorch multiplies by the reciprocal of a Python number instead, so a quotient that is
    a float16 may come out above it, and the scale would be the next float16.
    """
    return x / x.new_full((), by)


def _quantize_integers(x: Tensor, dim: int, bits: int) -> QuantizedTensor:
    """Affine integers of x with one scale and offset along `dim` (kept with size 1)."""
    low, high = _bounds(x, dim)
    # Dequantization uses the stored float16 scale and offset, so round them before quantizing.
    offset = _half_below(low)
    scale = _half_scale(_divided(high - offset.float(), 2**bits - 1))
    qdata = ((x.float() - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return QuantizedTensor(qdata.nan_to_num(0.0), scale, offset)


def _quantize_fp8(x: Tensor, dim: int) -> QuantizedTensor:
    """fp8 values of x with one scale and offset along `dim`: the middle is 0, the ends +-448."""
    low, high = _bounds(x, dim)
    offset = ((low + high) / 2).half()
    largest = torch.maximum(high - offset.float(), offset.float() - low)
    scale = _half_scale(_divided(largest, FP8_MAX))
    qdata = ((x.float() - offset.float()) / scale.float()).nan_to_num(0.0)
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
