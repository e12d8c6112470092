"""Attention calls of a known signature, repeated from the launches of the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, PagedKV, QuantizedKV, RaggedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.replay import Replay, is_hooked, record

Run = Callable[[AttentionCall], AttentionOutput]


def replayed(call: AttentionCall, name: str, run: Run) -> AttentionOutput:
    """`run(call)`, from what the first call of its signature has launched.

    Args:
        name: of the backend.
    """
    known = call.known
    if known is None or not call.q.is_cuda:
        return run(call)
    tensors = tensors_of(call)
    if name not in known.prepared:
        found, known.prepared[name] = record(lambda: run(call), _apart(tensors))
        return AttentionOutput(*found)
    replay: Replay | None = known.prepared[name]
    if replay is None or is_hooked():
        return run(call)
    return AttentionOutput(*replay(tensors))


def tensors_of(call: AttentionCall) -> list[Tensor]:
    """All tensors that a call reads, in an order that follows from its signature."""
    blocks = None if call.blocks is None else call.blocks.allowed
    offset = call.q_offset if isinstance(call.q_offset, Tensor) else None
    others = (call.sink_logits, call.alibi_slopes, call.key_padding, call.kv_lens, blocks)
    every = (call.q, *_stored(call.kv), *others, call.attn_mask, offset)
    return [x for x in every if x is not None]


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, with others in place of values that begin where the keys do.

    That they do is a part of the signature, so kernels may be given the pointer of the keys for
    both.
    """
    q, k, v, *rest = tensors
    return [q, k, v.new_empty(1), *rest] if k.data_ptr() == v.data_ptr() != 0 else tensors


def _stored(kv: Any) -> tuple[Tensor | None, ...]:
    """The tensors of a view; views without a signature have no calls that are known."""
    if isinstance(kv, DenseKV):
        return kv.k, kv.v
    if isinstance(kv, PagedKV):
        return kv.k, kv.v, kv.page_table, kv.kv_lens
    if isinstance(kv, RaggedKV):
        return kv.k, kv.v, kv.page_table, kv.kv_lens, kv.positions
    assert isinstance(kv, QuantizedKV)
    return kv.recent_k, kv.recent_v, *kv.k, *kv.v
