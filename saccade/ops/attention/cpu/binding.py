"""Describing a call to the C++ kernels: an address, dtype, shape, strides and reach of each tensor.

Everything is checked again on the C++ side (csrc/checks.cpp) before a kernel runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from saccade.core import DenseKV, Mask, PagedKV, QuantizedKV, RaggedKV
from saccade.ops.attention.call import AttentionCall

_DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
}

_EXTRAS = (
    "sink_logits",
    "alibi_slopes",
    "key_padding",
    "kv_lens",
    "cu_seqlens",
    "blocks",
    "attn_mask",
)

# A plain constant, which torch.compile takes as it is; the extension is loaded when it first runs.
BUILT = find_spec("saccade._cpu") is not None

_Record: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], int]


@cache
def extension() -> ModuleType | None:
    """The compiled kernels, or None where the package was built without them."""
    try:
        return import_module("saccade._cpu")
    except ImportError:
        return None


@cache
def target() -> str:
    """SIMD target to run, "" for the best; the variable exists for tests alone."""
    return os.environ.get("SACCADE_CPU_TARGET", "")


def is_strided(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.shape[-1] > 1


def arguments(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[object, ...]:
    """The call as the binding reads it; the tensors have to stay alive meanwhile."""
    return *description(call, out, lse), torch.get_num_threads(), target()


def description(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[object, ...]:
    """The call as the binding reads it, but for threads and target."""
    return (
        record(call.q),
        record(out),
        record(lse),
        VIEWS[type(call.kv)](call.kv),
        *_mask_options(call.mask),
        call.scale,
        call.softcap or 0.0,
        call.q_offset if isinstance(call.q_offset, int) else record(call.q_offset),
        _extras(call),
    )


def attend_described(described: Any, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Run a call whose signature was described before: addresses alone go to the kernels.

    Args:
        described: what the binding made of `description` of a call of the same signature.
    """
    own = (_unit_rows(call.q), out, lse, *_STORED[type(call.kv)](call.kv))
    tensors = (*own, *_other_tensors(call))  # alive during the call
    places: list[object] = []
    for x in tensors:
        storage = x.untyped_storage().nbytes()
        places += (x.data_ptr(), storage - x.storage_offset() * x.element_size())
    described.attend(tuple(places), torch.get_num_threads(), target())


def _other_tensors(call: AttentionCall) -> list[Tensor]:
    """Tensors beside queries and keys, in the order in which the binding describes them."""
    blocks, bounds = call.blocks, call.cu_seqlens or ()
    found = (
        call.q_offset if isinstance(call.q_offset, Tensor) else None,
        None if call.sink_logits is None else _in_float32(call.sink_logits),
        None if call.alibi_slopes is None else _slopes(call.alibi_slopes),
        call.key_padding,
        call.kv_lens,
        *bounds,
        None if blocks is None else blocks.allowed,
        call.attn_mask,
    )
    return [x for x in found if x is not None]


def workspace_bytes(call: AttentionCall, *, receives: bool = False) -> int:
    """Bytes that the kernels allocate for themselves on all of torch's threads.

    On a busy machine saccade's own threads may hold as much besides (csrc/pool.cpp).
    Reads shapes and options only, so `call` may hold fake tensors.  Rows of different lengths
    (`kv_lens`, pages) count with the longest, packed sequences (`cu_seqlens`) as a single one.
    """
    kernels = extension()
    assert kernels is not None
    q_len, blocks = call.q.shape[2], call.blocks
    _, kv_heads, kv_len, _, value_dim = call.kv.shape
    return kernels.workspace_bytes(
        tuple(call.q.shape),
        (kv_heads, kv_len, value_dim),
        isinstance(call.kv, RaggedKV),
        *_mask_options(call.mask),
        call.q_bounds(0, q_len)[1] - q_len + 1,
        (0, 0) if blocks is None else (blocks.q_block, blocks.k_block),
        call.q.element_size() if call.kv.hadamard else 0,
        torch.get_num_threads(),
        target(),
        receives,
    )


def _mask_options(mask: Mask) -> tuple[bool, int, int]:
    """(causal, window, sinks) for the binding: -1 for no window, large numbers cut to fit."""
    window = -1 if mask.window is None else min(mask.window, 2**62)
    return mask.causal, window, min(mask.sinks, 2**62)


def in_kernel_form(call: AttentionCall) -> AttentionCall:
    """The call with a unit stride in q and its few numbers per head in float32."""
    sinks, slopes = call.sink_logits, call.alibi_slopes
    if is_strided(call.q):
        call = call.with_(q=_unit_rows(call.q))
    if sinks is not None:
        call = call.with_(sink_logits=_in_float32(sinks))
    if slopes is not None:
        call = call.with_(alibi_slopes=_slopes(slopes))
    return call


def _unit_rows(q: Tensor) -> Tensor:
    return q.contiguous() if is_strided(q) else q


def _in_float32(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _slopes(x: Tensor) -> Tensor:
    """`[1 or batch, heads]`."""
    slopes = _in_float32(x)
    return slopes[None] if slopes.ndim == 1 else slopes


def record(x: Tensor) -> _Record:
    """A tensor as the kernels take it; strides in elements, the reach in bytes."""
    size = x.element_size()
    reach = int(x.untyped_storage().nbytes() - x.storage_offset() * size)
    return x.data_ptr(), _DTYPE_CODES[x.dtype], tuple(x.shape), x.stride(), reach


def _dense(kv: DenseKV) -> tuple[object, ...]:
    spans = () if kv.is_plain else tuple(tuple(span) for span in kv.spans)
    return "dense", record(kv.k), record(kv.v), spans


def _paged(kv: PagedKV) -> tuple[object, ...]:
    return "paged", record(kv.k), record(kv.v), record(kv.page_table), record(kv.kv_lens)


def _ragged(kv: RaggedKV) -> tuple[object, ...]:
    indices = (record(kv.page_table), record(kv.kv_lens), record(kv.positions))
    return "ragged", record(kv.k), record(kv.v), *indices


def _quantized(kv: QuantizedKV) -> tuple[object, ...]:
    recent = (record(kv.recent_k), record(kv.recent_v))
    qdata = tuple(record(part) for part in (*kv.k, *kv.v))
    return "quantized", *recent, *qdata, kv.bits_k, kv.bits_v, kv.k_group


# The tensors of each view, in the order of its description.
_STORED: dict[type, Callable[[Any], tuple[Tensor, ...]]] = {
    DenseKV: lambda kv: (kv.k, kv.v),
    PagedKV: lambda kv: (kv.k, kv.v, kv.page_table, kv.kv_lens),
    RaggedKV: lambda kv: (kv.k, kv.v, kv.page_table, kv.kv_lens, kv.positions),
    QuantizedKV: lambda kv: (kv.recent_k, kv.recent_v, *kv.k, *kv.v),
}

# How each view is described to the binding (csrc/binding.cpp names the fields).
VIEWS: dict[type, Callable[[Any], tuple[object, ...]]] = {
    DenseKV: _dense,
    PagedKV: _paged,
    RaggedKV: _ragged,
    QuantizedKV: _quantized,
}


def _extras(call: AttentionCall) -> tuple[object, ...] | None:
    """Everything beyond the mask, or None for a call without any of it."""
    if not call.kv.hadamard and all(getattr(call, name) is None for name in _EXTRAS):
        return None
    blocks = call.blocks
    return (
        _maybe(call.sink_logits),
        _maybe(call.alibi_slopes),
        _maybe(call.key_padding),
        _maybe(call.kv_lens),
        *(map(record, call.cu_seqlens) if call.cu_seqlens is not None else (None, None)),
        None if blocks is None else record(blocks.allowed),
        0 if blocks is None else blocks.q_block,
        0 if blocks is None else blocks.k_block,
        _maybe(call.attn_mask),
        int(call.kv.hadamard),
    )


def _maybe(x: Tensor | None) -> _Record | None:
    return None if x is None else record(x)
