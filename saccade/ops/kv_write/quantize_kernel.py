"""Kernels behind `quantize`: a group is loaded once for its offset, scale and quantized values.

    offset = min        scale = (max - min) / (2^bits - 1)       q = round((x - offset) / scale)
    fp8:  offset = middle    scale = max |x - offset| / 448      q = (x - offset) / scale

with offset and scale rounded to float16 first, as `core.formats` defines it.
A head is processed in two halves, because that is how 4-bit values share bytes.
"""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.formats import FP8, FP8_MAX, QuantizedTensor
from saccade.core.formats import TINY as SMALLEST_STEP
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.launching import on, quantized_strided, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.triton_lang import head_pointer

TOKENS = 32  # of a program that quantizes values or dequantizes
TINY = tl.constexpr(SMALLEST_STEP)
FP8_LARGEST = tl.constexpr(FP8_MAX)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to integers, ties to even


@triton.jit
def half_below(x):
    """The float16 next to float32 `x` that is not above it."""
    near = x.to(tl.float16)
    below = (x - tl.abs(x) * 0.00048828125 - 2.98023223876953125e-8).to(tl.float16)
    return tl.where(near.to(tl.float32) <= x, near, below)


@triton.jit
def half_scale(x):
    """The float16 next to a step `x` >= 0 that is not below it, so that no value is cut off."""
    near = tl.maximum(x, TINY).to(tl.float16)
    above = (x + x * 0.00048828125 + 2.98023223876953125e-8).to(tl.float16)
    return tl.where(near.to(tl.float32) >= x, near, above)


@triton.jit
def numbers(x, keep, other):
    """`x` where it is kept and not NaN, else `other`."""
    return tl.where(keep & (x == x), x, other)  # noqa: PLR0124


@triton.jit
def offset_and_scale(low, high, LEVELS: tl.constexpr, IS_FP8: tl.constexpr):
    """(offset, scale) in float16 of groups whose values lie between `low` and `high`.

    A group without a number has low = inf and high = -inf.
    """
    empty = low > high
    low, high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    if IS_FP8:
        offset = ((low + high) / 2).to(tl.float16)
        middle = offset.to(tl.float32)
        return offset, half_scale(tl.div_rn(tl.maximum(high - middle, middle - low), FP8_LARGEST))
    offset = half_below(low)
    return offset, half_scale(tl.div_rn(high - offset.to(tl.float32), LEVELS * 1.0))


@triton.jit
def quantize(x, offset, scale, LEVELS: tl.constexpr, IS_FP8: tl.constexpr):
    """Quantized values, as float32; 0 for NaN."""
    q = tl.div_rn(x - offset.to(tl.float32), scale.to(tl.float32))
    q = numbers(q, True, 0.0)
    if IS_FP8:
        return tl.minimum(tl.maximum(q, -FP8_LARGEST), FP8_LARGEST)
    return tl.minimum(tl.maximum((q + ROUND) - ROUND, 0.0), LEVELS)


@triton.jit
def store_quantized(at, low, high, keep, HALF: tl.constexpr, BITS: tl.constexpr):
    """Store the quantized values of both halves of a head from `at` on."""
    dtype: tl.constexpr = at.dtype.element_ty
    if BITS == 4:
        tl.store(at, (low.to(tl.int32) | (high.to(tl.int32) << 4)).to(dtype), mask=keep)
    elif dtype == tl.uint8:
        tl.store(at, low.to(tl.int32).to(dtype), mask=keep)
        tl.store(at + HALF, high.to(tl.int32).to(dtype), mask=keep)
    else:
        tl.store(at, low.to(dtype), mask=keep)
        tl.store(at + HALF, high.to(dtype), mask=keep)


@triton.jit
def quantize_keys_kernel(x, storage, heads, GROUP: tl.constexpr, BLOCK: tl.constexpr,
                         HALF: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr,
                         IS_FP8: tl.constexpr):  # fmt: skip
    """One group of tokens of one head: a scale and an offset for every channel."""
    group = tl.program_id(0).to(tl.int64)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    LEVELS: tl.constexpr = 2**BITS - 1
    token, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows = group * GROUP + token
    keep = (token < GROUP)[:, None] & (dims < HALF)[None, :]
    x_at = head_pointer(x, b, h) + rows[:, None] * x.row + dims[None, :]
    scale_at = head_pointer(storage.scale, b, h) + group * storage.scale.row + dims
    offset_at = head_pointer(storage.offset, b, h) + group * storage.offset.row + dims
    low = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=keep, other=0.0).to(tl.float32)
    least, most = float("inf"), float("-inf")
    low_offset, low_scale = offset_and_scale(
        tl.min(numbers(low, keep, least), 0),
        tl.max(numbers(low, keep, most), 0), LEVELS, IS_FP8,
    )  # fmt: skip
    high_offset, high_scale = offset_and_scale(
        tl.min(numbers(high, keep, least), 0),
        tl.max(numbers(high, keep, most), 0), LEVELS, IS_FP8,
    )  # fmt: skip
    low = quantize(low, low_offset[None, :], low_scale[None, :], LEVELS, IS_FP8)
    high = quantize(high, high_offset[None, :], high_scale[None, :], LEVELS, IS_FP8)
    qdata_at = head_pointer(storage.qdata, b, h) + rows[:, None] * storage.qdata.row + dims[None, :]
    store_quantized(qdata_at, low, high, keep, HALF, BITS)
    keep = dims < HALF
    tl.store(scale_at, low_scale, mask=keep)
    tl.store(scale_at + HALF, high_scale, mask=keep)
    tl.store(offset_at, low_offset, mask=keep)
    tl.store(offset_at + HALF, high_offset, mask=keep)


@triton.jit
def quantize_values_kernel(x, storage, heads, length, TOKENS: tl.constexpr, HALF: tl.constexpr,
                  BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
                  IS_FP8: tl.constexpr):  # fmt: skip
    """Some tokens of one head: a scale and an offset for every group of GROUP channels.

    GROUP is the full head, or a power of two that divides half of it.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    LEVELS: tl.constexpr = 2**BITS - 1
    WHOLE_HEAD: tl.constexpr = GROUP == 2 * HALF
    WIDTH: tl.constexpr = BLOCK_D if WHOLE_HEAD else GROUP
    GROUPS: tl.constexpr = BLOCK_D // WIDTH  # in a half
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    dims, index = tl.arange(0, BLOCK_D), tl.arange(0, GROUPS)
    valid = rows < length
    keep = valid[:, None] & (dims < HALF)[None, :]
    x_at = head_pointer(x, b, h) + rows[:, None] * x.row + dims[None, :]
    low = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=keep, other=0.0).to(tl.float32)
    inside = (dims < HALF)[None, :]
    shape: tl.constexpr = (TOKENS, GROUPS, WIDTH)
    low_min = tl.min(numbers(low, inside, float("inf")).reshape(shape), 2)
    low_max = tl.max(numbers(low, inside, float("-inf")).reshape(shape), 2)
    high_min = tl.min(numbers(high, inside, float("inf")).reshape(shape), 2)
    high_max = tl.max(numbers(high, inside, float("-inf")).reshape(shape), 2)
    if WHOLE_HEAD:
        low_min, low_max = tl.minimum(low_min, high_min), tl.maximum(low_max, high_max)
        high_min, high_max = low_min, low_max
    low_offset, low_scale = offset_and_scale(low_min, low_max, LEVELS, IS_FP8)
    high_offset, high_scale = offset_and_scale(high_min, high_max, LEVELS, IS_FP8)
    low = quantize(
        low.reshape(shape), low_offset[:, :, None], low_scale[:, :, None], LEVELS, IS_FP8
    ).reshape((TOKENS, BLOCK_D))
    high = quantize(
        high.reshape(shape), high_offset[:, :, None], high_scale[:, :, None], LEVELS, IS_FP8
    ).reshape((TOKENS, BLOCK_D))
    qdata_at = head_pointer(storage.qdata, b, h) + rows[:, None] * storage.qdata.row + dims[None, :]
    store_quantized(qdata_at, low, high, keep, HALF, BITS)
    scale_at = (
        head_pointer(storage.scale, b, h) + rows[:, None] * storage.scale.row + index[None, :]
    )
    offset_at = (
        head_pointer(storage.offset, b, h) + rows[:, None] * storage.offset.row + index[None, :]
    )
    keep = valid[:, None] & (index * WIDTH < HALF)[None, :]
    tl.store(scale_at, low_scale, mask=keep)
    tl.store(offset_at, low_offset, mask=keep)
    if not WHOLE_HEAD:
        tl.store(scale_at + HALF // WIDTH, high_scale, mask=keep)
        tl.store(offset_at + HALF // WIDTH, high_offset, mask=keep)


@triton.jit
def dequantize(storage, q, b, h, rows, dims, keep, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Dequantized values; a scale is shared by TOKENS tokens and CHANNELS channels."""
    row, channel = (rows // TOKENS)[:, None], (dims // CHANNELS)[None, :]
    scale_at = head_pointer(storage.scale, b, h) + row * storage.scale.row + channel
    offset_at = head_pointer(storage.offset, b, h) + row * storage.offset.row + channel
    scale = tl.load(scale_at, mask=keep, other=0.0).to(tl.float32)
    return q.to(tl.float32) * scale + tl.load(offset_at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def dequantize_kernel(storage, out, heads, length, ROWS: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """Some tokens of one head in full precision."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    keep = (rows < length)[:, None] & (dims < HALF)[None, :]
    qdata_at = head_pointer(storage.qdata, b, h) + rows[:, None] * storage.qdata.row + dims[None, :]
    low = tl.load(qdata_at, mask=keep)
    if BITS == 4:
        low, high = low & 15, low >> 4
    else:
        high = tl.load(qdata_at + HALF, mask=keep)
    low = dequantize(storage, low, b, h, rows, dims, keep, TOKENS, CHANNELS)
    high = dequantize(storage, high, b, h, rows, dims + HALF, keep, TOKENS, CHANNELS)
    at = head_pointer(out, b, h) + rows[:, None] * out.row + dims[None, :]
    tl.store(at, low.to(out.ptr.dtype.element_ty), mask=keep)
    tl.store(at + HALF, high.to(out.ptr.dtype.element_ty), mask=keep)


def quantize_keys_by_kernel(k: Tensor, into: QuantizedTensor, bits: int, group: int) -> None:
    """`quantize_keys_into` by one kernel."""
    batch, heads, length, dim = k.shape
    with on(k.device):
        launch_kernel(
            quantize_keys_kernel,
            (length // group, batch * heads),
            strided(unit_rows(k)),
            quantized_strided(into),
            heads,
            GROUP=group,
            BLOCK=next_power_of_two(group),
            HALF=dim // 2,
            BLOCK_D=next_power_of_two(dim // 2),
            BITS=bits,
            IS_FP8=into.qdata.dtype == FP8,
            num_warps=4,
        )


def quantize_values_by_kernel(v: Tensor, into: QuantizedTensor, bits: int, group: int) -> None:
    """`quantize_values_into` by one kernel."""
    batch, heads, length, dim = v.shape
    with on(v.device):
        launch_kernel(
            quantize_values_kernel,
            (cdiv(length, TOKENS), batch * heads),
            strided(unit_rows(v)),
            quantized_strided(into),
            heads,
            length,
            TOKENS=TOKENS,
            HALF=dim // 2,
            BLOCK_D=next_power_of_two(dim // 2),
            GROUP=group,
            BITS=bits,
            IS_FP8=into.qdata.dtype == FP8,
            num_warps=4,
        )


def dequantize_by_kernel(
    x: QuantizedTensor, like: Tensor, dim: int, *, bits: int, tokens: int, channels: int
) -> Tensor:
    """The values `[B, Hkv, n, dim]` in the dtype of `like`, by one kernel.

    Args:
        tokens, channels: how many of each share a scale.
    """
    batch, heads, length, _ = x.qdata.shape
    out = torch.empty(batch, heads, length, dim, dtype=like.dtype, device=like.device)
    with on(like.device):
        launch_kernel(dequantize_kernel, (cdiv(length, TOKENS), batch * heads), 
            quantized_strided(x), strided(out), heads, length, ROWS=TOKENS, HALF=dim // 2,
            BLOCK_D=next_power_of_two(dim // 2), TOKENS=tokens, CHANNELS=channels, BITS=bits,
            num_warps=4,
        )  # fmt: skip
    return out
