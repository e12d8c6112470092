"""Attention by the package's own C++ kernels: prefill and decoding on CPUs, over every view.

The kernels (csrc/) stack the query heads of a group as rows, pack and convert each tile of keys
once for all of them, and skip tiles in which every key is masked for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, KVView, PagedKV, QuantizedKV, RaggedKV
from saccade.core.formats import FP8
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu.binding import (
    BUILT,
    VIEWS,
    arguments,
    attend_described,
    description,
    extension,
    in_kernel_form,
    is_strided,
    record,
    workspace_bytes,
)
from saccade.ops.attention.cpu.gradients import backward
from saccade.ops.planning import counting, note_workspace, planning

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 576

_BY_POSITION = ("key_padding", "blocks", "attn_mask")


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    if not BUILT:
        return (
            "the package was built without its C++ kernels; "
            "install a C++20 compiler (GCC or Clang) and reinstall saccade"
        )
    q, kv = call.q, call.kv
    if type(kv) not in VIEWS:
        return f"it does not support views of type {type(kv).__name__}"
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
    quantized = (*kv.k, *kv.v) if isinstance(kv, QuantizedKV) else ()
    if any(map(is_strided, (k, v, *quantized))):
        return "keys and values need a unit last stride"
    if isinstance(kv, QuantizedKV) and FP8 in (kv.k.qdata.dtype, kv.v.qdata.dtype):
        return "its kernels do not read fp8 keys; int8 takes as many bytes and is more exact"
    if isinstance(kv, RaggedKV) and any(getattr(call, name) is not None for name in _BY_POSITION):
        return "a ragged view takes no key_padding, blocks or attn_mask"
    return None


def _full_precision(kv: KVView) -> tuple[Tensor, Tensor]:
    """The keys and values of a supported view that are not quantized."""
    if isinstance(kv, QuantizedKV):
        return kv.recent_k, kv.recent_v
    assert isinstance(kv, DenseKV | PagedKV | RaggedKV)
    return kv.k, kv.v


def _has_gradient(call: AttentionCall) -> bool:
    learned_slopes = call.alibi_slopes is not None and call.alibi_slopes.requires_grad
    if call.blocks is not None or call.attn_mask is not None or learned_slopes:
        return False
    return isinstance(call.kv, DenseKV) and call.kv.is_plain


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of the call by the C++ kernels; gradients: see `backward`.

    Raises:
        ValueError: a table entry, length, offset or stride that does not fit the tensors.
    """
    known = call.known
    prepared = None if known is None else known.prepared.get("cpu")
    if prepared is None:
        shape = call.q.shape[:3]
        shapes, described = ((*shape, call.kv.shape[4]), shape), None
    else:
        shapes, described = prepared
    # new_empty: inside of `with torch.device(...)` torch.empty would allocate elsewhere.
    out = call.q.new_empty(shapes[0])
    lse = call.q.new_empty(shapes[1], dtype=torch.float32)
    if counting():
        note_workspace(workspace_bytes(call))
    if planning():
        return AttentionOutput(out, lse)
    if described is not None:
        attend_described(described, call, out, lse)
    else:
        kernels = extension()
        assert kernels is not None
        plain = in_kernel_form(call)  # the name keeps converted tensors alive during the call
        kernels.attend(*arguments(plain, out, lse))
        if known is not None:
            known.prepared["cpu"] = shapes, kernels.describe(*description(plain, out, lse))
    return AttentionOutput(out, lse)


def run_received(call: AttentionCall, *, largest: bool) -> tuple[AttentionOutput, Tensor]:
    """`run`, and what each key received; see `attend_received`, where calls are chosen."""
    batch, kv_heads, end, _, value_dim = call.kv.shape
    shape = call.q.shape[:3]
    out = call.q.new_empty((*shape, value_dim))
    lse = call.q.new_empty(shape, dtype=torch.float32)
    received = call.q.new_empty((batch, kv_heads, end), dtype=torch.float32)
    if counting():
        note_workspace(workspace_bytes(call, receives=True))
    if not planning():
        kernels = extension()
        assert kernels is not None
        plain = in_kernel_form(call)
        kernels.attend_received(*arguments(plain, out, lse), record(received), largest)
    return AttentionOutput(out, lse), received


forward = run
__all__ = ["backward", "forward", "refusal", "run", "run_received"]
