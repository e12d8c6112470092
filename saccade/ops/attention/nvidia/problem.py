"""Problem: an attention call as the launchers of GPU kernels read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.core import DenseKV, Mask, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.launching import unit_rows


@dataclass(frozen=True, slots=True)
class Problem:
    """A call with its storage: unit last strides, one kv_lens for all ways to say it.

    Attributes:
        call: what is computed, with its mask and what changes the scores.
        q: `[B, H, Lq, D]`; k, v: storage in the layout of the call's view.
        kv_lens: int32 or int64 `[B]` or `[B, Hkv]`, keys of each row, None where all have
            `num_keys`.
        q_offsets: int64 `[B]`, position of each row's first query; None: `q_offset` for all.
        block_mask: bool `[B | 1, Hkv | 1, q blocks, k blocks]` of `q_block` x `k_block`, the
            blocks that are computed; None for all.
    """

    call: AttentionCall
    q: Tensor
    k: Tensor
    v: Tensor
    kv_lens: Tensor | None
    q_offsets: Tensor | None
    block_mask: Tensor | None

    @property
    def mask(self) -> Mask:
        return self.call.mask

    @property
    def cu_q(self) -> Tensor | None:
        return None if self.call.cu_seqlens is None else self.call.cu_seqlens[0].contiguous()

    @property
    def cu_k(self) -> Tensor | None:
        return None if self.call.cu_seqlens is None else self.call.cu_seqlens[1].contiguous()

    @property
    def q_offset(self) -> int:
        """Position of the first query; 0 where `q_offsets` says it."""
        return self.call.q_offset if isinstance(self.call.q_offset, int) else 0

    @property
    def q_block(self) -> int:
        return 1 if self.call.blocks is None else self.call.blocks.q_block

    @property
    def k_block(self) -> int:
        return 1 if self.call.blocks is None else self.call.blocks.k_block

    @property
    def num_keys(self) -> int:
        """Positions of the view: the last key of the longest row, plus one."""
        return self.call.kv.shape[2]

    @property
    def raw(self) -> bool:
        """Scores are plain products: the kernels fold scale and log2(e) into one multiply-add."""
        call = self.call
        return call.softcap is None and call.alibi_slopes is None and call.scale > 0

    def without_blocks(self) -> Problem:
        """The same problem over all blocks, for kernels whose block lists already say which."""
        return self if self.block_mask is None else replace(self, block_mask=None)


def paged_kv_lens(call: AttentionCall) -> Tensor:
    """Keys of each row of a call over pages: those that are stored, or fewer."""
    assert isinstance(call.kv, PagedKV)
    stored = call.kv.kv_lens
    return stored if call.kv_lens is None else torch.minimum(stored, call.kv_lens)


def problem_of(call: AttentionCall, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Problem:
    """The Problem of a call whose keys and values are stored in `k` and `v`, whatever the view."""
    offset = call.q_offset
    return Problem(
        call=call,
        q=unit_rows(call.q),
        k=k,
        v=v,
        kv_lens=kv_lens,
        q_offsets=None if isinstance(offset, int) else offset.contiguous(),
        block_mask=None if call.blocks is None else call.blocks.allowed,
    )


def dense_problem(call: AttentionCall) -> Problem:
    """The Problem of a call over a plain dense view."""
    assert isinstance(call.kv, DenseKV)
    return problem_of(call, unit_rows(call.kv.k), unit_rows(call.kv.v), call.kv_lens)
