"""Appending at a position that is a tensor, so that one CUDA graph serves every decoding step.

A decoding step does the same work for every token, apart from the position it writes to.  As a
host number the position would be fixed in the captured kernel arguments; as a device tensor it
changes between replays.  The host keeps its own count beside it (`commit`) and does what is rare,
growing and quantizing, between two steps (`reserve`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from saccade.cache.base import LayerCache
from saccade.core import KVView
from saccade.ops.kv_write.records import PendingRope


class Cursor(NamedTuple):
    """Positions of the new tokens of a step: int64 `[B]` each, the same number in every row.

    Attributes:
        start: position of the first new token, which is the number of tokens seen before.
        stop: one past the last.
    """

    start: Tensor
    stop: Tensor

    def minus(self, removed: int) -> Cursor:
        """The cursor in slots instead of positions, in a cache that has removed `removed` keys."""
        return Cursor(self.start - removed, self.stop - removed) if removed else self


class StepView(NamedTuple):
    """What the queries of a decoding step attend to.

    Attributes:
        view: all storage, filled or not.
        cursor: first and last query in the positions of the view; keys from `stop` on are empty.
        q: the queries `[B, H, t, D]` after RoPE, where the cache applied it; else None.
    """

    view: KVView
    cursor: Cursor
    q: Tensor | None


@runtime_checkable
class SteppingCache(LayerCache, Protocol):
    """A layer cache whose storage keeps its addresses from one token to the next."""

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens; storage may move, which changes `graph_key`.

        Raises:
            Unsupported: the cache is empty, so shapes and dtypes are unknown, or `count` is more
                than one step may append.
        """
        ...

    def graph_key(self) -> tuple[int, ...]:
        """What a captured step depends on: addresses, sizes, removed keys; after `reserve`."""
        ...

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepView:
        """Store keys `[B, Hkv, t, D]` and values at the cursor; `seen` changes with `commit`.

        Args:
            rope: rotary tables and queries, where RoPE is still to be applied to keys and queries.
        """
        ...

    def commit(self, count: int) -> None:
        """Count `count` tokens that steps have written."""
        ...
