"""Appending at a place that only the device knows, so that one captured step serves every token.

A step of decoding is the same work for every token, apart from where it lies.  Told by the host,
that place would be written into each kernel's arguments; told by a tensor, the whole step can be
captured as one CUDA graph and replayed.  The host keeps its own count beside it (`advance`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from saccade.cache.base import LayerCache
from saccade.core import KVView
from saccade.ops.kv_write.records import PendingRope


class Cursor(NamedTuple):
    """Where the new tokens of a step lie: int64 `[B]` each, the same number in every row.

    Attributes:
        start: position of the first new token, which is the number of tokens seen before.
        stop: one past the last.
    """

    start: Tensor
    stop: Tensor

    def back(self, gap: int) -> Cursor:
        """The same place counted in slots, where `gap` tokens are no longer held."""
        return Cursor(self.start - gap, self.stop - gap) if gap else self


class StepWrite(NamedTuple):
    """What a step may attend to.

    Attributes:
        view: all storage, most of it perhaps empty.
        cursor: first and last query in the positions of the view; keys from `stop` on are empty.
        q: the turned queries `[B, H, t, D]`, where the caller left turning to the cache.
    """

    view: KVView
    cursor: Cursor
    q: Tensor | None


@runtime_checkable
class SteppingCache(LayerCache, Protocol):
    """A layer cache whose storage stays where it is from one token to the next."""

    def reserve(self, count: int) -> None:
        """Make room for `count` tokens more; storage may move, and `place` says whether it did.

        Raises:
            Unsupported: the cache is empty, so nobody knows what to make room for.
        """
        ...

    def graph_key(self) -> tuple[int, ...]:
        """Everything a captured step depends on: addresses, sizes, forgotten tokens."""
        ...

    def write(self, k: Tensor, v: Tensor, cursor: Cursor, rope: PendingRope | None) -> StepWrite:
        """Store keys `[B, Hkv, t, D]` and values at the cursor; the host's count stays.

        Args:
            turn: rotary tables where keys and queries are not yet turned.
        """
        ...

    def commit(self, count: int) -> None:
        """Count `count` tokens that steps have stored."""
        ...
