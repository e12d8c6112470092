"""GGUF's blocks as packed weights, and rounding to packed weights of our own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.linear import native, unpacked_blocks
from saccade.ops.linear.packed import PackedWeight, empty, pack


class _Form(NamedTuple):
    """A kind of block: its bytes and numbers, and what it is packed to."""

    n_bytes: int
    numbers: int
    bits: int
    group: int
    with_minimum: bool


_FORMS = {
    "Q4_0": _Form(18, 32, 4, 32, False),
    "Q4_1": _Form(20, 32, 4, 32, True),
    "Q5_0": _Form(22, 32, 6, 32, False),
    "Q5_1": _Form(24, 32, 6, 32, True),
    "Q8_0": _Form(34, 32, 8, 32, False),
    "Q4_K": _Form(144, 256, 4, 32, True),
    "Q5_K": _Form(176, 256, 6, 32, True),
    "Q6_K": _Form(210, 256, 6, 16, False),
}
_PLAIN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def packed_blocks(kind: str, raw: Tensor) -> PackedWeight | None:
    """A matrix of a GGUF file as it is: raw uint8 `[rows, bytes of a row]`, which is only read.

    None where a kind has no packed form, or where a product of scales leaves float16's range.
    """
    if kind not in _FORMS:
        return None
    form = _FORMS[kind]
    if raw.ndim != 2 or raw.dtype != torch.uint8 or raw.shape[1] % form.n_bytes:
        raise ValueError(
            f"raw must be uint8 [rows, whole blocks of {form.n_bytes} bytes] for {kind}, "
            f"got {raw.dtype} {list(raw.shape)}."
        )
    width = raw.shape[1] // form.n_bytes * form.numbers
    weight = empty(
        raw.shape[0], width, bits=form.bits, group=form.group, with_minimum=form.with_minimum
    )
    if native.usable(weight) and raw.is_cpu:
        return weight if native.fill(weight, kind, _in_rows(raw)) else None
    q, scale, low = unpacked_blocks.read(kind, raw.reshape(raw.shape[0], -1, form.n_bytes))
    if not scale.isfinite().all() or (low is not None and not low.isfinite().all()):
        return None
    return pack(q, scale, low, bits=form.bits)


def quantized(weight: Tensor, bits: int) -> PackedWeight:
    """A matrix `[out, in]` rounded to nearest in groups of 32: 8 bits, or 4 with a minimum.

    Raises:
        ValueError: the rows are not whole groups, or a number is not finite or beyond float16.
    """
    if bits not in (4, 8) or weight.ndim != 2 or weight.shape[1] % 32:
        raise ValueError(
            f"quantized needs 4 or 8 bits and a matrix whose rows are multiples of 32, "
            f"got {bits} bits and {list(weight.shape)}."
        )
    if weight.dtype not in _PLAIN:
        raise TypeError(f"quantized needs float32, bfloat16 or float16, got {weight.dtype}.")
    weight = weight.detach()
    found = empty(*weight.shape, bits=bits, group=32, with_minimum=bits == 4)
    if native.usable(found) and weight.is_cpu:
        raw = weight.contiguous().view(torch.uint8)
        in_range = native.fill(found, _PLAIN[weight.dtype], raw)
    else:
        found, in_range = _rounded_by_torch(weight, bits)
    if not in_range:
        raise ValueError("quantized needs finite numbers within float16's range.")
    return found


def _rounded_by_torch(weight: Tensor, bits: int) -> tuple[PackedWeight, bool]:
    groups = weight.float().reshape(weight.shape[0], -1, 32)
    low = groups.amin(-1).half() if bits == 4 else None
    shifted = groups if low is None else groups - low.float().unsqueeze(-1)
    largest = groups.abs().amax(-1) / 127 if low is None else shifted.amax(-1) / 15
    scale = largest.half()
    wide = scale.float().unsqueeze(-1)
    q = torch.where(wide == 0, 0.0, shifted / wide).round()
    q = q.clamp(0, 15).to(torch.uint8) if bits == 4 else q.clamp(-127, 127).to(torch.int8)
    in_range = bool(groups.isfinite().all() and scale.isfinite().all())
    if low is not None:
        in_range = in_range and bool(low.isfinite().all())
    return pack(q.reshape(weight.shape), scale, low, bits=bits), in_range


def _in_rows(raw: Tensor) -> Tensor:
    return raw if raw.stride(1) == 1 or raw.shape[1] < 2 else raw.contiguous()
