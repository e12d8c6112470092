"""Problem: an attention call over dense keys, flat, as an operator of torch.library takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.launching import unit_rows


@dataclass(frozen=True, slots=True)
class Problem:
    """Tensors, optional tensors and plain numbers; see AttentionCall for their meaning."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_logits: Tensor | None
    slopes: Tensor | None
    padding: Tensor | None
    kv_lens: Tensor | None
    offsets: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    allowed: Tensor | None
    foreign: Tensor | None
    causal: bool
    window: int | None
    sinks: int
    scale: float
    softcap: float | None
    q_offset: int
    q_block: int
    k_block: int
    num_keys: int

    @property
    def raw(self) -> bool:
        """Scores are plain products: the kernels fold scale and log2(e) into one multiply-add."""
        return self.softcap is None and self.slopes is None and self.scale > 0


def paged_kv_lens(call: AttentionCall) -> Tensor:
    """Keys of each row of a call over pages: those that are stored, or fewer."""
    assert isinstance(call.kv, PagedKV)
    stored = call.kv.kv_lens
    return stored if call.kv_lens is None else torch.minimum(stored, call.kv_lens)


def problem_of(call: AttentionCall, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Problem:
    """The Problem of a call whose keys and values are stored in `k` and `v`, whatever the view."""
    whole = isinstance(call.q_offset, int)
    blocks = call.blocks
    cu_q, cu_k = (None, None) if call.cu_seqlens is None else call.cu_seqlens
    return Problem(
        q=unit_rows(call.q),
        k=k,
        v=v,
        sink_logits=call.sink_logits,
        slopes=call.alibi_slopes,
        padding=call.key_padding,
        kv_lens=kv_lens,
        offsets=None if whole else call.q_offset.contiguous(),  # type: ignore[union-attr]
        cu_q=cu_q,
        cu_k=cu_k,
        allowed=None if blocks is None else blocks.allowed,
        foreign=call.attn_mask,
        causal=call.mask.causal,
        window=call.mask.window,
        sinks=call.mask.sinks,
        scale=call.scale,
        softcap=call.softcap,
        q_offset=call.q_offset if whole else 0,  # type: ignore[arg-type]
        q_block=1 if blocks is None else blocks.q_block,
        k_block=1 if blocks is None else blocks.k_block,
        num_keys=call.kv.shape[2],
    )


def dense_problem(call: AttentionCall) -> Problem:
    """The Problem of a call over a plain dense view."""
    assert isinstance(call.kv, DenseKV)
    return problem_of(call, unit_rows(call.kv.k), unit_rows(call.kv.v), call.kv_lens)
