"""Kernels behind `ops.pack`: codes, scale and offset of a group from one reading of its numbers.

    offset = min        scale = (max - min) / (2^bits - 1)       code = round((x - offset) / scale)
    fp8:  offset = middle    scale = max |x - offset| / 448      code = (x - offset) / scale

with offset and scale rounded to float16 before codes are taken, as `core.formats` defines it.
Everything is done by halves of a head, which is how four-bit codes share bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.formats import FP8, FP8_MAX, QuantizedTensor
from saccade.ops.attention.nvidia.triton.quantized_decode import Coded
from saccade.ops.gpu.intmath import cdiv, power_of_two
from saccade.ops.gpu.launching import on, strided, unit_rows

TOKENS = 32  # of a program that packs or writes out values
TINY = tl.constexpr(2.0**-24)  # the smallest scale float16 holds
FP8_LARGEST = tl.constexpr(FP8_MAX)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers, halves to even


@triton.jit
def start_of(strided, b, h):
    """Pointer to the first row of a head."""
    return strided.ptr + b * strided.batch + h * strided.head


@triton.jit
def range_of(low, high, LEVELS: tl.constexpr, IS_FP8: tl.constexpr):
    """(offset, scale) in float16 of groups whose numbers lie between `low` and `high`."""
    if IS_FP8:
        offset = ((low + high) / 2).to(tl.float16)
        middle = offset.to(tl.float32)
        scale = tl.div_rn(tl.maximum(high - middle, middle - low), FP8_LARGEST)
    else:
        offset = low.to(tl.float16)
        scale = tl.div_rn(high - offset.to(tl.float32), LEVELS * 1.0)
    return offset, tl.maximum(scale, TINY).to(tl.float16)


@triton.jit
def code_of(x, offset, scale, LEVELS: tl.constexpr, IS_FP8: tl.constexpr):
    """Codes of numbers, as float32."""
    code = tl.div_rn(x - offset.to(tl.float32), scale.to(tl.float32))
    if IS_FP8:
        return tl.minimum(tl.maximum(code, -FP8_LARGEST), FP8_LARGEST)
    return tl.minimum(tl.maximum((code + ROUND) - ROUND, 0.0), LEVELS)


@triton.jit
def store_codes(at, low, high, keep, HALF: tl.constexpr, BITS: tl.constexpr):
    """Store the codes of both halves of a head from `at` on."""
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
def keys_kernel(x, coded, heads, GROUP: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
                BLOCK_D: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr):  # fmt: skip
    """One group of tokens of one head: a scale and an offset for every channel."""
    group = tl.program_id(0).to(tl.int64)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    LEVELS: tl.constexpr = 2**BITS - 1
    token, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows = group * GROUP + token
    keep = (token < GROUP)[:, None] & (dims < HALF)[None, :]
    x_at = start_of(x, b, h) + rows[:, None] * x.row + dims[None, :]
    scale_at = start_of(coded.scale, b, h) + group * coded.scale.row + dims
    offset_at = start_of(coded.offset, b, h) + group * coded.offset.row + dims
    low = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=keep, other=0.0).to(tl.float32)
    least, most = float("inf"), float("-inf")
    low_offset, low_scale = range_of(
        tl.min(tl.where(keep, low, least), 0), tl.max(tl.where(keep, low, most), 0), LEVELS, IS_FP8
    )
    high_offset, high_scale = range_of(
        tl.min(tl.where(keep, high, least), 0), tl.max(tl.where(keep, high, most), 0), LEVELS,
        IS_FP8,
    )  # fmt: skip
    low = code_of(low, low_offset[None, :], low_scale[None, :], LEVELS, IS_FP8)
    high = code_of(high, high_offset[None, :], high_scale[None, :], LEVELS, IS_FP8)
    code_at = start_of(coded.qdata, b, h) + rows[:, None] * coded.qdata.row + dims[None, :]
    store_codes(code_at, low, high, keep, HALF, BITS)
    held = dims < HALF
    tl.store(scale_at, low_scale, mask=held)
    tl.store(scale_at + HALF, high_scale, mask=held)
    tl.store(offset_at, low_offset, mask=held)
    tl.store(offset_at + HALF, high_offset, mask=held)


@triton.jit
def values_kernel(x, coded, heads, length, TOKENS: tl.constexpr, HALF: tl.constexpr,
                  BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
                  IS_FP8: tl.constexpr):  # fmt: skip
    """Some tokens of one head: a scale and an offset for every group of GROUP channels.

    GROUP is the whole head, or a power of two that divides half of it.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    LEVELS: tl.constexpr = 2**BITS - 1
    WHOLE: tl.constexpr = GROUP == 2 * HALF
    WIDTH: tl.constexpr = BLOCK_D if WHOLE else GROUP
    GROUPS: tl.constexpr = BLOCK_D // WIDTH  # in a half
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    dims, index = tl.arange(0, BLOCK_D), tl.arange(0, GROUPS)
    there = rows < length
    keep = there[:, None] & (dims < HALF)[None, :]
    x_at = start_of(x, b, h) + rows[:, None] * x.row + dims[None, :]
    low = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=keep, other=0.0).to(tl.float32)
    inside = (dims < HALF)[None, :]
    shape: tl.constexpr = (TOKENS, GROUPS, WIDTH)
    low_min = tl.min(tl.where(inside, low, float("inf")).reshape(shape), 2)
    low_max = tl.max(tl.where(inside, low, float("-inf")).reshape(shape), 2)
    high_min = tl.min(tl.where(inside, high, float("inf")).reshape(shape), 2)
    high_max = tl.max(tl.where(inside, high, float("-inf")).reshape(shape), 2)
    if WHOLE:
        low_min, low_max = tl.minimum(low_min, high_min), tl.maximum(low_max, high_max)
        high_min, high_max = low_min, low_max
    low_offset, low_scale = range_of(low_min, low_max, LEVELS, IS_FP8)
    high_offset, high_scale = range_of(high_min, high_max, LEVELS, IS_FP8)
    low = code_of(
        low.reshape(shape), low_offset[:, :, None], low_scale[:, :, None], LEVELS, IS_FP8
    ).reshape((TOKENS, BLOCK_D))
    high = code_of(
        high.reshape(shape), high_offset[:, :, None], high_scale[:, :, None], LEVELS, IS_FP8
    ).reshape((TOKENS, BLOCK_D))
    code_at = start_of(coded.qdata, b, h) + rows[:, None] * coded.qdata.row + dims[None, :]
    store_codes(code_at, low, high, keep, HALF, BITS)
    scale_at = start_of(coded.scale, b, h) + rows[:, None] * coded.scale.row + index[None, :]
    offset_at = start_of(coded.offset, b, h) + rows[:, None] * coded.offset.row + index[None, :]
    held = there[:, None] & (index * WIDTH < HALF)[None, :]
    tl.store(scale_at, low_scale, mask=held)
    tl.store(offset_at, low_offset, mask=held)
    if not WHOLE:
        tl.store(scale_at + HALF // WIDTH, high_scale, mask=held)
        tl.store(offset_at + HALF // WIDTH, high_offset, mask=held)


@triton.jit
def number_of(coded, code, b, h, rows, dims, keep, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Numbers of codes; a scale holds for TOKENS tokens and CHANNELS channels."""
    row, channel = (rows // TOKENS)[:, None], (dims // CHANNELS)[None, :]
    scale_at = start_of(coded.scale, b, h) + row * coded.scale.row + channel
    offset_at = start_of(coded.offset, b, h) + row * coded.offset.row + channel
    scale = tl.load(scale_at, mask=keep, other=0.0).to(tl.float32)
    return code.to(tl.float32) * scale + tl.load(offset_at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def write_kernel(coded, out, heads, length, ROWS: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """Some tokens of one head in full precision."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    keep = (rows < length)[:, None] & (dims < HALF)[None, :]
    code_at = start_of(coded.qdata, b, h) + rows[:, None] * coded.qdata.row + dims[None, :]
    low = tl.load(code_at, mask=keep)
    if BITS == 4:
        low, high = low & 15, low >> 4
    else:
        high = tl.load(code_at + HALF, mask=keep)
    low = number_of(coded, low, b, h, rows, dims, keep, TOKENS, CHANNELS)
    high = number_of(coded, high, b, h, rows, dims + HALF, keep, TOKENS, CHANNELS)
    at = start_of(out, b, h) + rows[:, None] * out.row + dims[None, :]
    tl.store(at, low.to(out.ptr.dtype.element_ty), mask=keep)
    tl.store(at + HALF, high.to(out.ptr.dtype.element_ty), mask=keep)


def launch_keys(k: Tensor, into: QuantizedTensor, bits: int, group: int) -> None:
    """`ops.pack.pack_keys` by one kernel."""
    batch, heads, length, dim = k.shape
    block_d = power_of_two(dim // 2)
    with on(k.device):
        keys_kernel[(length // group, batch * heads)](
            strided(unit_rows(k)), _planes(into), heads, GROUP=group, BLOCK=power_of_two(group),
            HALF=dim // 2, BLOCK_D=block_d, BITS=bits, IS_FP8=into.qdata.dtype == FP8, num_warps=4,
        )  # fmt: skip


def launch_values(v: Tensor, into: QuantizedTensor, bits: int, group: int) -> None:
    """`ops.pack.pack_values` by one kernel."""
    batch, heads, length, dim = v.shape
    with on(v.device):
        values_kernel[(cdiv(length, TOKENS), batch * heads)](
            strided(unit_rows(v)), _planes(into), heads, length, TOKENS=TOKENS, HALF=dim // 2,
            BLOCK_D=power_of_two(dim // 2), GROUP=group, BITS=bits,
            IS_FP8=into.qdata.dtype == FP8, num_warps=4,
        )  # fmt: skip


def write(
    qdata: QuantizedTensor, like: Tensor, dim: int, *, bits: int, tokens: int, channels: int
) -> Tensor:
    """Codes as numbers `[B, Hkv, n, dim]` of the dtype of `like`, by one kernel.

    Args:
        tokens, channels: how many of each share a scale.
    """
    batch, heads, length, _ = qdata.qdata.shape
    out = torch.empty(batch, heads, length, dim, dtype=like.dtype, device=like.device)
    with on(like.device):
        write_kernel[(cdiv(length, TOKENS), batch * heads)](
            _planes(qdata), strided(out), heads, length, ROWS=TOKENS, HALF=dim // 2,
            BLOCK_D=power_of_two(dim // 2), TOKENS=tokens, CHANNELS=channels, BITS=bits,
            num_warps=4,
        )  # fmt: skip
    return out


def _planes(qdata: QuantizedTensor) -> Coded:
    return Coded(*(strided(unit_rows(part)) for part in qdata))
