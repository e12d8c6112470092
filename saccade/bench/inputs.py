"""Tensors of a case: random, because zeros run faster, and the same in every run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.bench.cases import BITS, GROUP, Case, value_group
from saccade.core import DenseKV, KVView, QuantizedKV
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.ops.kv_write.hadamard import hadamard_transform

COLD_BYTES = 256 << 20  # more than the caches of a CPU hold
SEED = 2205
# Bits of keys and of values, and whether they are fp8.
KINDS = {"int8": (8, 8, False), "int4": (4, 4, False), "fp8": (8, 8, True), "k8v4": (8, 4, False)}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a case is computed from.

    Attributes:
        q: `[1, H, Lq, D]`; grad: of the output, for backward.
        views: equal views in different memory.  Decoding reads one after another, as it
            does with the layers of a model, so that no keys are still in the CPU's caches.
    """

    q: Tensor
    views: tuple[KVView, ...]
    grad: Tensor | None = None


def make(case: Case, *, seed: int = SEED) -> Inputs:
    """Inputs of the case: standard normal numbers."""
    source = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, case.head_dim, generator=source).to(case.q_dtype)

    q = normal(case.heads, case.q_len)
    k, v = normal(case.kv_heads, case.kv_len), normal(case.kv_heads, case.kv_len)
    if case.work == "backward":
        for x in (q, k, v):
            x.requires_grad_()
        return Inputs(q, (DenseKV(k, v),), normal(case.heads, case.q_len))
    view = _view(case, k, v)
    copies = [_copy(view) for _ in range(_num_copies(case) - 1)]
    return Inputs(q, (view, *copies))


def _num_copies(case: Case) -> int:
    return -(-COLD_BYTES // case.kv_bytes) if case.work == "decode" else 1


def _copy(view: DenseKV | QuantizedKV) -> KVView:
    if isinstance(view, DenseKV):
        return DenseKV(view.k.clone(), view.v.clone())
    return replace(
        view,
        k=QuantizedTensor(*(part.clone() for part in view.k)),
        v=QuantizedTensor(*(part.clone() for part in view.v)),
        recent_k=view.recent_k.clone(),
        recent_v=view.recent_v.clone(),
    )


def _view(case: Case, k: Tensor, v: Tensor) -> DenseKV | QuantizedKV:
    if case.storage not in BITS:
        return DenseKV(k, v)
    if case.hadamard:
        k, v = hadamard_transform(k), hadamard_transform(v)
    bits, packed = BITS[case.storage], case.num_quantized
    group = value_group(case.head_dim)
    keys = quantize_keys(k[:, :, :packed], bits=bits, group=GROUP)
    values = quantize_values(v[:, :, :packed], bits=bits, group=group)
    return QuantizedKV(
        k=QuantizedTensor(*(part.contiguous() for part in keys)),
        v=QuantizedTensor(*(part.contiguous() for part in values)),
        recent_k=k[:, :, packed:].contiguous(),
        recent_v=v[:, :, packed:].contiguous(),
        bits_k=bits,
        bits_v=bits,
        k_group=GROUP,
        hadamard=case.hadamard,
    )


def quantized_view(
    k: Tensor, v: Tensor, kind: str, recent: int = 0, v_group: int = GROUP
) -> QuantizedKV:
    """A quantized view of KINDS[kind] over keys and values `[B, H, L, D]` but the last `recent`."""
    bits_k, bits_v, fp8 = KINDS[kind]
    n = k.shape[2] - recent
    keys = quantize_keys(k[:, :, :n], bits=bits_k, group=GROUP, fp8=fp8)
    values = quantize_values(v[:, :, :n], bits=bits_v, group=v_group, fp8=fp8)
    return QuantizedKV(keys, values, k[:, :, n:], v[:, :, n:], bits_k, bits_v, GROUP)
