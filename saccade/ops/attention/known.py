"""Calls that were checked before, found again by one dictionary look-up.

A model makes the same few calls again and again: the same shapes, strides, dtypes and options over
other numbers.  What follows from those alone (that they fit together, which backend computes them,
how they are described to its kernels) is worked out for the first call of such a *signature* and
remembered; what depends on numbers in tensors is checked in every call (`checks.check_numbers`).

Nothing is remembered of a call that raised, and no tensor is kept.  Where something watches or
transforms operators (torch.compile, tracing, dispatch modes, torch.func), or a tensor is of an
unusual kind, a call has no signature and is worked out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, QuantizedKV, RaggedKV, Span
from saccade.ops.planning import planning

Signature: TypeAlias = tuple[Hashable, ...]

MOST = 1024  # signatures, a few KiB each; every length of a growing cache is another one


class Known:
    """What is known of all calls of one signature.

    Attributes:
        mask, scale, softcap, wants_lse: options of the call, checked.
        q_offset: as in AttentionCall; None where it follows from lengths in a tensor.
        spans: of plain tensors given as keys and values.
        learns: whether a tensor wants gradients, where they are enabled.
        backends: which backend computes the call, by the name that was asked for and everything
            else that the choice depends on (see `dispatch.remembered`).
        prepared: what a backend worked out for its kernels, by the backend's name.
    """

    __slots__ = (
        "backends", "learns", "mask", "prepared", "q_offset", "scale", "softcap", "spans",
        "wants_lse",
    )  # fmt: skip

    def __init__(
        self,
        mask: Mask,
        numbers: tuple[float, float | None],
        q_offset: int | None,
        spans: tuple[Span, ...],
        *,
        wants_lse: bool,
        learns: bool,
    ) -> None:
        self.mask, self.q_offset, self.spans = mask, q_offset, spans
        self.scale, self.softcap = numbers
        self.wants_lse, self.learns = wants_lse, learns
        self.backends: dict[Hashable, Any] = {}
        self.prepared: dict[str, Any] = {}


NO_OTHERS = (None,) * 7
"""sink_logits, alibi_slopes, key_padding, kv_lens, blocks, attn_mask and offsets, all left out."""

_known: dict[Signature, Known] = {}
_NUMBERS = frozenset((bool, int, float, type(None)))


def find(signature: Signature | None) -> Known | None:
    """What is known of a signature, None at its first call."""
    return None if signature is None else _known.get(signature)


def remember(signature: Signature, known: Known) -> None:
    """Keep what was worked out; everything is dropped where it has become too much."""
    if len(_known) >= MOST:
        _known.clear()
    _known[signature] = known


def clear() -> None:
    """Forget every call."""
    _known.clear()


def is_disturbed() -> bool:
    """Whether anything watches or transforms operators now, so that calls are no plain ones."""
    c = torch._C
    return (
        torch.compiler.is_compiling()
        or c._len_torch_dispatch_stack() > 0
        or c._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
        or c._get_tracing_state() is not None  # pyright: ignore[reportUnnecessaryComparison]
        or forward_ad._current_level >= 0
        or planning()
    )


def signature_of(
    q: object,
    kv: object,
    options: tuple[object, ...],
    others: tuple[object, ...],
) -> Signature | None:
    """Everything that a call is checked for but the numbers in its tensors, or None.

    Args:
        q: the queries.
        kv: a view, or a tuple (k, v) of plain tensors.
        options: numbers, bools and None; their types count too, since True is no 1 here.
        others: what NO_OTHERS names; it is itself what most calls give.
    """
    describe = _VIEWS.get(type(kv))
    kinds = tuple(map(type, options))
    if describe is None or not _NUMBERS.issuperset(kinds) or is_disturbed():
        return None
    try:
        if others is NO_OTHERS:
            return _part(q), describe(kv), options, kinds
        return _part(q), describe(kv), options, kinds, *map(_part, others)
    except (AttributeError, RuntimeError, TypeError):  # no plain tensors
        return None


def _part(x: Any) -> Hashable:
    """One tensor, as far as it is checked and as backends choose by it: kernels read 16 bytes.

    Raises:
        TypeError, RuntimeError: not a tensor with memory at strides.
    """
    if x is None:
        return None
    if type(x) is BlockSelection:
        return _part(x.allowed), x.q_block, x.k_block
    if type(x) is not Tensor and type(x) is not Parameter:
        raise TypeError
    strides = x.stride()
    return x.shape, strides, x.dtype, x.device, x.requires_grad, x.is_neg(), x.data_ptr() % 16


def _pair(kv: tuple[Any, Any]) -> Hashable:
    return _part(kv[0]), _part(kv[1]), _same_memory(kv[0], kv[1])


def _same_memory(k: Tensor, v: Tensor) -> bool:
    """Whether values begin where keys do: they may be channels of keys."""
    return k.data_ptr() == v.data_ptr()


def _dense(kv: DenseKV) -> Hashable:
    return _part(kv.k), _part(kv.v), _same_memory(kv.k, kv.v), kv.spans, kv.hadamard


def _paged(kv: PagedKV) -> Hashable:
    tensors = (kv.k, kv.v, kv.page_table, kv.kv_lens)
    return "paged", *map(_part, tensors), _same_memory(kv.k, kv.v), kv.end, kv.hadamard


def _ragged(kv: RaggedKV) -> Hashable:
    tensors = (kv.k, kv.v, kv.page_table, kv.kv_lens, kv.positions)
    same = _same_memory(kv.k, kv.v)
    return "ragged", *map(_part, tensors), same, kv.end, kv.max_length, kv.hadamard


def _quantized(kv: QuantizedKV) -> Hashable:
    tensors = (kv.recent_k, kv.recent_v, *kv.k, *kv.v)
    return *map(_part, tensors), kv.bits_k, kv.bits_v, kv.k_group, kv.hadamard, kv.first


_VIEWS: dict[type, Callable[[Any], Hashable]] = {
    tuple: _pair,
    DenseKV: _dense,
    PagedKV: _paged,
    RaggedKV: _ragged,
    QuantizedKV: _quantized,
}
