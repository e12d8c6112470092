"""Quantizing full groups of tokens into a cache, and dequantizing a range of it.

By one kernel where Triton runs; elsewhere by the definition (`core.formats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import KeyRange, QuantizedKV
from saccade.core.formats import FP8, QuantizedTensor, quantize_keys, quantize_values
from saccade.ops.gpu.support import converts_fp8, has_triton

MAX_DIM, MAX_GROUP = 512, 256


def quantize_keys_into(k: Tensor, into: QuantizedTensor, *, bits: int, group: int) -> None:
    """Quantize keys `[B, Hkv, N, D]`, N a multiple of `group`, into storage.

    Args:
        into: qdata `[B, Hkv, N, D(/2)]` (uint8, or float8_e4m3fn for fp8), float16 scale and
            offset `[B, Hkv, N/group, D]`; views with a unit last stride.
    """
    if _by_kernel(k, into, group):
        from saccade.ops.kv_write.quantize_kernel import quantize_keys_by_kernel

        return quantize_keys_by_kernel(k, into, bits, group)
    fp8 = into.qdata.dtype == FP8
    return _copy(quantize_keys(k, bits=bits, group=group, fp8=fp8), into)


def quantize_values_into(v: Tensor, into: QuantizedTensor, *, bits: int, group: int) -> None:
    """Quantize values `[B, Hkv, N, D]`, D a multiple of `group`, into storage.

    Args:
        into: as for keys, but scale and offset `[B, Hkv, N, D/group]`.
    """
    dim = v.shape[3]
    fits = group == dim or (dim // 2 % group == 0 and group & (group - 1) == 0)
    if fits and _by_kernel(v, into, 1):
        from saccade.ops.kv_write.quantize_kernel import quantize_values_by_kernel

        return quantize_values_by_kernel(v, into, bits, group)
    fp8 = into.qdata.dtype == FP8
    return _copy(quantize_values(v, bits=bits, group=group, fp8=fp8), into)


def dequantize_range(kv: QuantizedKV, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Quantized keys and values start .. stop-1 in full precision, `[B, Hkv, n, D]` each.

    Args:
        start, stop: multiples of `kv.k_group` up to `kv.num_quantized`, from the first key on.
    """
    groups = slice(start // kv.k_group, stop // kv.k_group)
    k = QuantizedTensor(kv.k.qdata[:, :, start:stop], *(x[:, :, groups] for x in kv.k[1:]))
    v = QuantizedTensor(*(x[:, :, start:stop] for x in kv.v))
    if _by_kernel(kv.recent_k, k, 1) and _by_kernel(kv.recent_v, v, 1):
        from saccade.ops.kv_write.quantize_kernel import dequantize_by_kernel

        value_group = kv.shape[4] // kv.v.scale.shape[3]
        like = kv.recent_k
        return (
            dequantize_by_kernel(
                k, like, kv.shape[3], bits=kv.bits_k, tokens=kv.k_group, channels=1
            ),
            dequantize_by_kernel(
                v, like, kv.shape[4], bits=kv.bits_v, tokens=1, channels=value_group
            ),
        )
    within = KeyRange(kv.first + start, kv.first + stop)
    tile = next(iter(kv.tiles((within,), stop - start)))
    return tile.k, tile.v


def _by_kernel(x: Tensor, storage: QuantizedTensor, group: int) -> bool:
    """Whether the kernels take tensors like `x` and this storage."""
    if not has_triton(x.device) or torch.compiler.is_compiling():
        return False
    if x.numel() == 0 or x.dtype == torch.float64 or x.requires_grad:
        return False
    if x.shape[3] % 2 or x.shape[3] > MAX_DIM or group > MAX_GROUP:
        return False
    if storage.qdata.dtype == FP8 and not converts_fp8(x.device):
        return False
    return all(part.stride(-1) == 1 or part.shape[-1] == 1 for part in storage)


def _copy(found: QuantizedTensor, into: QuantizedTensor) -> None:
    for store, new in zip(into, found, strict=True):
        store.copy_(new)
