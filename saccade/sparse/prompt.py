"""Patterns for prompts: chosen from the queries and keys of a call, where few queries read all.

They look at the keys themselves, so selecting costs a share of dense attention.  That pays for a
chunk of a prompt, whose queries share it, and not for a decoding step, which reads all keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView, RaggedKV
from saccade.core.held_values import holding
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.selection import BlockRule, always_read

LEAST_QUERIES: Final = 16
"""Fewer queries read all keys: decoding steps and drafts."""

PIECE: Final = 2048
"""Most queries that are scored at once, which bounds the memory of a long prompt."""

R = TypeVar("R")
P = ParamSpec("P")
_behind: ContextVar[int] = ContextVar("saccade_tokens_behind", default=0)


def followed_by(tokens: int, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """`call(*args, **kwargs)`, which reads a part of a prompt that goes on with so many tokens."""
    return holding(_behind, tokens, call, *args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCall:
    """A call as a PromptPattern sees it.

    Attributes:
        q: `[B, H, Lq, D]`, after RoPE.
        kv: the view of the keys.
        q_offset: position of the first query.
        always, seen: bool grids of blocks that are always read, `[B | 1, 1, q_blocks, k_blocks]`,
            and that lie before or at the queries, `[q_blocks, k_blocks]`.
        padding: bool `[B, Lk]`, False for keys that are none; None: all are keys.
        behind: tokens of the prompt behind the queries.
    """

    q: Tensor
    kv: KVView
    q_offset: int
    always: Tensor
    seen: Tensor
    padding: Tensor | None
    behind: int

    def keys(self) -> tuple[Tensor, Tensor | None]:
        """Keys by position `[B, Hkv, Lk, D]` in the dtype of q, before any Hadamard transform.

        Returns:
            The keys, and bool `[B, Hkv | 1, Lk]`, False where there is none; None: all are there.
        """
        k, real = keys_by_position(self.kv, self.padding)
        if real is not None:  # whatever lies there, NaN too, is not to change a score
            k = k.masked_fill(~real[..., None], 0)
        return k.to(self.q.dtype), real

    def pieces(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """Whole blocks of queries, PIECE of them or fewer, and where in the call they begin."""
        size = max(1, PIECE // block) * block
        return ((at, self.q[:, :, at : at + size]) for at in range(0, self.q.shape[2], size))

    def _starts(self, block: int) -> Tensor:
        """Position of the first query of each block."""
        stop = self.q_offset + self.q.shape[2]
        return torch.arange(self.q_offset, stop, block, device=self.q.device)

    def block_numbers(self, block: int) -> tuple[Tensor, Tensor]:
        """Numbers of the blocks of keys that blocks of queries begin in, and of all, int64 1-D."""
        columns = torch.arange(self.seen.shape[1], device=self.q.device)
        return self._starts(block) // block, columns

    def distances(self, block: int) -> Tensor:
        """How many blocks a block of keys lies behind one of queries, `[q_blocks, k_blocks]`."""
        rows, columns = self.block_numbers(block)
        return rows[:, None] - columns

    def last_rows(self, block: int, count: int) -> Tensor:
        """Blocks with one of the last `count` queries of a prompt, `[B | 1, 1, q_blocks, 1]`."""
        stop, device = self.q_offset + self.q.shape[2], self.q.device
        last = (self._starts(block) + block).clamp_max(stop) - 1
        if self.padding is None or self.behind:
            end = torch.full((1, 1), stop + self.behind, device=device)
        else:  # of each row of the batch where it ends
            places = torch.arange(1, self.padding.shape[1] + 1, device=device)
            end = (places * self.padding).amax(1, keepdim=True)
        return (last >= end - count)[:, None, :, None]


def keys_by_position(kv: KVView, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys by position `[B, Hkv, Lk, D]`, before any Hadamard transform.

    Args:
        padding: bool `[B, Lk]`, False for keys that are none; None: all are keys.

    Returns:
        The keys, and bool `[B, Hkv | 1, Lk]`, False where there is none; None: all are there.
    """
    tile, end = dense(kv), kv.shape[2]
    k = hadamard_transform(tile.k) if kv.hadamard else tile.k
    real = None if padding is None else padding[:, None]
    if isinstance(kv, RaggedKV) or k.shape[2] != end:
        at = tile.positions.expand(k.shape[:3])
        at = at.where(at >= 0, end)
        here = at.new_zeros(*k.shape[:2], end + 1, dtype=torch.bool)
        here = here.scatter(2, at, value=True)[:, :, :end]
        room = k.new_zeros(*k.shape[:2], end + 1, k.shape[3])
        k = room.scatter(2, at[..., None].expand_as(k), k)[:, :, :end]
        real = here if real is None else real & here
    return k, real


class PromptPattern(ABC):
    """A pattern that selects for prompts, in square blocks; a subclass has the fields below.

    Fewer queries than a block, or than LEAST_QUERIES, read all keys.

    Attributes:
        block: tokens in a block of queries and of keys.
        sink_blocks: first key blocks, always read; those of a padded row are its first real ones.
        window_blocks: most recent key blocks, always read, the current one counted.
    """

    __slots__ = ()
    block: int
    sink_blocks: int
    window_blocks: int

    @abstractmethod
    def chosen(self, call: PromptCall) -> Tensor:
        """Blocks beyond those that are always read: bool `[B | 1, Hkv | 1, q_blocks, k_blocks]`.

        Blocks behind the queries may be among them; they are not read.
        """

    @property
    def is_dense(self) -> bool:
        """Whether all blocks are read whatever they hold, so that nothing has to be scored."""
        return False

    def first_layer(self, num_layers: int) -> int:
        """The first layer of a model that is sparse; those before it read all keys."""
        return 0

    @property
    def least_queries(self) -> int:
        """Fewer queries read all keys."""
        return max(LEAST_QUERIES, self.block)

    def reads_all(self, q_len: int) -> bool:
        """Whether so many queries read all keys."""
        return self.is_dense or q_len < self.least_queries

    def select(
        self, q: Tensor, kv: KVView, q_offset: int, padding: Tensor | None = None
    ) -> BlockSelection:
        """See Pattern.

        Args:
            padding: bool `[B, Lk]`, False for keys that are padding.
        """
        rule = BlockRule(
            summary="none", q_block=self.block, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks,
        )  # fmt: skip
        num_blocks = -(-kv.shape[2] // self.block)
        always, seen = always_read(rule, q, q_offset, num_blocks)
        always = always[None, None]
        if self.reads_all(q.shape[2]):
            allowed = seen[None, None]
        else:
            if padding is not None:
                always = always | (_first_blocks(padding, self, num_blocks) & seen)
            call = PromptCall(
                q=q, kv=kv, q_offset=q_offset, always=always, seen=seen, padding=padding,
                behind=_behind.get(),
            )  # fmt: skip
            allowed = always | (self.chosen(call) & seen)
        return BlockSelection(allowed=allowed, q_block=self.block, k_block=self.block)


def _first_blocks(padding: Tensor, pattern: PromptPattern, num_blocks: int) -> Tensor:
    """Blocks that hold the first real keys of each row: bool `[B, 1, 1, num_blocks]`."""
    first = padding.int().argmax(-1)[:, None, None, None] // pattern.block
    blocks = torch.arange(num_blocks, device=padding.device)
    return (blocks >= first) & (blocks < first + pattern.sink_blocks)
