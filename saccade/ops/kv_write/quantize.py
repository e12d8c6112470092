"""Quantising whole groups of tokens into a cache, and writing some of it out again.

One pass over the numbers where Triton runs; elsewhere the definition itself (`core.formats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import QuantizedKV
from saccade.core.formats import FP8, QuantizedTensor, quantize_keys, quantize_values
from saccade.ops.gpu.support import converts_fp8, has_triton

MAX_DIM, MAX_GROUP = 512, 256


def pack_keys(k: Tensor, into: QuantizedTensor, *, bits: int, group: int) -> None:
    """Quantise keys `[B, Hkv, N, D]`, N a multiple of `group`, into storage.

    Args:
        into: codes `[B, Hkv, N, D(/2)]` (uint8, or float8_e4m3fn for fp8), float16 scale and
            offset `[B, Hkv, N/group, D]`; views with a unit last stride.
    """
    if _by_kernel(k, into, group):
        from saccade.ops.kv_write.quantize_kernel import launch_keys

        return launch_keys(k, into, bits, group)
    fp8 = into.qdata.dtype == FP8
    return _copy(quantize_keys(k, bits=bits, group=group, fp8=fp8), into)


def pack_values(v: Tensor, into: QuantizedTensor, *, bits: int, group: int) -> None:
    """Quantise values `[B, Hkv, N, D]`, D a multiple of `group`, into storage.

    Args:
        into: as for keys, but scale and offset `[B, Hkv, N, D/group]`.
    """
    dim = v.shape[3]
    whole = group == dim or (dim // 2 % group == 0 and group & (group - 1) == 0)
    if whole and _by_kernel(v, into, 1):
        from saccade.ops.kv_write.quantize_kernel import launch_values

        return launch_values(v, into, bits, group)
    fp8 = into.qdata.dtype == FP8
    return _copy(quantize_values(v, bits=bits, group=group, fp8=fp8), into)


def write_out(kv: QuantizedKV, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Packed keys and values start .. stop-1 in full precision, `[B, Hkv, n, D]` each.

    Args:
        start, stop: multiples of `kv.k_group` below `kv.num_quantized`.
    """
    groups = slice(start // kv.k_group, stop // kv.k_group)
    k = QuantizedTensor(kv.k.qdata[:, :, start:stop], *(x[:, :, groups] for x in kv.k[1:]))
    v = QuantizedTensor(*(x[:, :, start:stop] for x in kv.v))
    if _by_kernel(kv.recent_k, k, 1) and _by_kernel(kv.recent_v, v, 1):
        from saccade.ops.kv_write.quantize_kernel import write

        value_group = kv.shape[4] // kv.v.scale.shape[3]
        like = kv.recent_k
        return (
            write(k, like, kv.shape[3], bits=kv.bits_k, tokens=kv.k_group, channels=1),
            write(v, like, kv.shape[4], bits=kv.bits_v, tokens=1, channels=value_group),
        )
    tile = next(iter(kv.tiles(((start, stop),), stop - start)))  # type: ignore[arg-type]
    return tile.k, tile.v


def _by_kernel(x: Tensor, qdata: QuantizedTensor, group: int) -> bool:
    """Whether the kernels serve numbers like `x` and this storage."""
    if not has_triton(x.device) or torch.compiler.is_compiling():
        return False
    if x.numel() == 0 or x.dtype == torch.float64 or x.requires_grad:
        return False
    if x.shape[3] % 2 or x.shape[3] > MAX_DIM or group > MAX_GROUP:
        return False
    if qdata.qdata.dtype == FP8 and not converts_fp8(x.device):
        return False
    return all(part.stride(-1) == 1 or part.shape[-1] == 1 for part in qdata)


def _copy(found: QuantizedTensor, into: QuantizedTensor) -> None:
    for store, new in zip(into, found, strict=True):
        store.copy_(new)
