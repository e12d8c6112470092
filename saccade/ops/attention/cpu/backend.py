"""Attention by the package's own C++ kernels: prefill and decoding on CPUs, over every view.

The kernels (csrc/) stack the query heads of a group as rows, pack and convert each tile of keys
once for all of them, and visit only the tiles that the mask lets a row see.  This module describes
tensors to them: an address, a dtype, shape, strides, and how far the storage reaches.  Everything
is checked again on the C++ side before a kernel runs.
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

from saccade.core import AttentionOutput, DenseKV, KVView, Mask, PagedKV, QuantizedKV, RaggedKV
from saccade.core.formats import FP8
from saccade.ops.attention.call import AttentionCall
from saccade.ops.planning import note_workspace, planning

_DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 576
_EXTRAS = (
    "sink_logits",
    "alibi_slopes",
    "key_padding",
    "kv_lens",
    "cu_seqlens",
    "blocks",
    "attn_mask",
)

_BY_POSITION = ("key_padding", "blocks", "attn_mask")

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
def _target() -> str:
    """SIMD target to run, "" for the best; the variable exists for tests alone."""
    return os.environ.get("SACCADE_CPU_TARGET", "")


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    if not BUILT:
        return (
            "the package was built without its C++ kernels; "
            "install a C++20 compiler (GCC or Clang) and reinstall saccade"
        )
    q, kv = call.q, call.kv
    if type(kv) not in _VIEWS:
        return f"it does not know views of type {type(kv).__name__}"
    k, v = _full_precision(kv)
    if not (q.is_cpu and k.is_cpu):
        return f"tensors are on {q.device} and {k.device}, not on the CPU"
    for x in (q, k, v):
        if x.dtype not in _FLOATS:
            return f"{x.dtype} is not one of float32, bfloat16, float16"
        if x.shape[-1] > _MAX_DIM:
            return f"head_dim {x.shape[-1]} is above {_MAX_DIM}"
    if call.needs_grad and not _has_gradient(call):
        return "gradients need plain keys and no blocks, attn_mask or learned slopes"
    if _is_strided(k) or _is_strided(v):
        return "keys and values need a unit last stride"
    if isinstance(kv, QuantizedKV) and FP8 in (kv.k.qdata.dtype, kv.v.qdata.dtype):
        return "its kernels do not read fp8 codes; int8 takes as many bytes and is closer"
    if isinstance(kv, RaggedKV) and any(getattr(call, name) is not None for name in _BY_POSITION):
        return "a ragged view takes no key_padding, blocks or attn_mask"
    return None


def _full_precision(kv: KVView) -> tuple[Tensor, Tensor]:
    """The keys and values of a known view that are not codes."""
    if isinstance(kv, QuantizedKV):
        return kv.recent_k, kv.recent_v
    assert isinstance(kv, DenseKV | PagedKV | RaggedKV)
    return kv.k, kv.v


def _has_gradient(call: AttentionCall) -> bool:
    learned_slopes = call.alibi_slopes is not None and call.alibi_slopes.requires_grad
    foreign = call.blocks is not None or call.attn_mask is not None or learned_slopes
    return isinstance(call.kv, DenseKV) and call.kv.is_plain and not foreign


def _is_strided(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.shape[-1] > 1


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of the call by the C++ kernels.

    Raises:
        ValueError: a table entry, length, offset or stride that does not fit the tensors.
    """
    if call.needs_grad or torch.compiler.is_compiling():
        from saccade.ops.attention.cpu import autograd as cpu_autograd

        return cpu_autograd.run(call)
    return compute(call)


def compute(call: AttentionCall) -> AttentionOutput:
    """`run` without autograd."""
    kernels = extension()
    assert kernels is not None
    call = in_kernel_form(call)  # a name of its own keeps converted tensors alive during the call
    out = torch.empty((*call.q.shape[:3], call.kv.shape[4]), dtype=call.q.dtype)
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32)
    if planning():
        note_workspace(workspace_bytes(call))
    else:
        kernels.attend(*arguments(call, out, lse))
    return AttentionOutput(out, lse)


def arguments(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[object, ...]:
    """The call as the binding reads it; the tensors have to stay alive meanwhile."""
    return (
        record(call.q),
        record(out),
        record(lse),
        _VIEWS[type(call.kv)](call.kv),
        *_mask_options(call.mask),
        call.scale,
        call.softcap or 0.0,
        call.q_offset if isinstance(call.q_offset, int) else record(call.q_offset),
        _extras(call),
        torch.get_num_threads(),
        _target(),
    )


def workspace_bytes(call: AttentionCall) -> int:
    """Bytes that the kernels allocate for themselves on all of torch's threads.

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
        torch.get_num_threads(),
        _target(),
    )


def _mask_options(mask: Mask) -> tuple[bool, int, int]:
    """(causal, window, sinks) for the binding: -1 for no window, large numbers cut to fit."""
    window = -1 if mask.window is None else min(mask.window, 2**62)
    return mask.causal, window, min(mask.sinks, 2**62)


def in_kernel_form(call: AttentionCall) -> AttentionCall:
    """The call with a unit stride in q and its few numbers per head in float32."""
    if _is_strided(call.q):
        call = call.with_(q=call.q.contiguous())
    sinks, slopes = call.sink_logits, call.alibi_slopes
    if sinks is not None:
        call = call.with_(sink_logits=sinks.detach().float().contiguous())
    if slopes is not None:
        slopes = slopes.detach().float().contiguous()
        call = call.with_(alibi_slopes=slopes[None] if slopes.ndim == 1 else slopes)
    return call


def record(x: Tensor) -> _Record:
    """What the kernels have to know of a tensor; strides in elements, the reach in bytes."""
    size = x.element_size()
    reach = int(x.untyped_storage().nbytes() - x.storage_offset() * size)
    return x.data_ptr(), _DTYPE_CODES[x.dtype], tuple(x.shape), x.stride(), reach


def _dense(kv: DenseKV) -> tuple[object, ...]:
    spans = () if kv.is_plain else tuple(tuple(span) for span in kv.spans)
    return "dense", record(kv.k), record(kv.v), spans


def _paged(kv: PagedKV) -> tuple[object, ...]:
    return "paged", record(kv.k), record(kv.v), record(kv.table), record(kv.kv_lens)


def _ragged(kv: RaggedKV) -> tuple[object, ...]:
    indices = (record(kv.table), record(kv.kv_lens), record(kv.positions))
    return "ragged", record(kv.k), record(kv.v), *indices


def _quantized(kv: QuantizedKV) -> tuple[object, ...]:
    recent = (record(kv.recent_k), record(kv.recent_v))
    qdata = tuple(record(part) for part in (*kv.k, *kv.v))
    return "quantized", *recent, *qdata, kv.bits_k, kv.bits_v, kv.k_group


# How each view is described to the binding (csrc/binding.cpp names the fields).
_VIEWS: dict[type, Callable[[Any], tuple[object, ...]]] = {
    DenseKV: _dense,
    PagedKV: _paged,
    RaggedKV: _ragged,
    QuantizedKV: _quantized,
}


def _extras(call: AttentionCall) -> tuple[object, ...] | None:
    """Everything beyond the mask, or None for a call without any of it."""
    if all(getattr(call, name) is None for name in _EXTRAS):
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
    )


def _maybe(x: Tensor | None) -> _Record | None:
    return None if x is None else record(x)
