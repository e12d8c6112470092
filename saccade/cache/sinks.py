"""Where the keys of attention sinks stand: near the window, however long the text (StreamingLLM).

A model attends to its first tokens from everywhere.  In a text longer than it was trained for their
distance would grow past every distance that it knows, and what it writes falls apart.  StreamingLLM
(arXiv 2309.17453) therefore counts positions inside the cache: first the sinks, then the window.
Here keys of the window keep their true positions, so that all distances among them are right as
they are, and only the few keys of the sinks are moved after the window:

    moved by  0                               for queries at positions below `reach`
    moved by  block start - nearest distance  from there on, in blocks of `block` positions

so that the first query of a block sees the first sink at the nearest distance, which is
`window + sinks - 1`, and the last query `block - 1` further.  The place follows from the position
of the query alone, and not from how a text was cut into chunks.  Keys are always rotated from the
originals: roundings do not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import ShiftKeys
from saccade.core import Unsupported

LARGEST_BLOCK = 512
"""Positions of queries that see the sinks at one place: the default chunk of a prompt."""


class SinkPlaces:
    """The original keys of the sinks of one ring, and where they stand now.

    Args:
        sinks: how many; window: of the ring, in tokens.

    Attributes:
        reach: longest distance that the positions of the model serve, itself counted; None: sinks
            are never moved.
        shift: rotates keys on by a number of positions; needed with a reach.
    """

    def __init__(self, sinks: int, window: int) -> None:
        self._sinks, self._window = sinks, window
        self.reach: int | None = None
        self.shift: ShiftKeys | None = None
        self._originals: Tensor | None = None
        self._moved = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the original keys."""
        return 0 if self._originals is None else self._originals.nbytes

    def allocate(self, keys: Tensor) -> None:
        """Make room for the originals of keys `[B, Hkv, slots, D]`, of which none is stored yet."""
        self._moved = 0
        self._originals = torch.empty_like(keys[:, :, : self._sinks]) if self._sinks else None

    def moved_at(self, position: int) -> int:
        """Positions by which the sinks are moved for a query at `position`."""
        if self.reach is None or not self._sinks or position < self.reach:
            return 0
        block = self.block
        nearest = max(0, min(self._window + self._sinks - 1, self.reach - block))
        return self.reach + (position - self.reach) // block * block - nearest

    def alike(self, position: int, most: int) -> int:
        """How many queries from `position` on, up to `most`, see the sinks at one place."""
        if self.reach is None or not self._sinks:
            return most
        if position < self.reach:
            return min(most, self.reach - position)
        return min(most, self.block - (position - self.reach) % self.block)

    def place(self, keys: Tensor, position: int, count: int) -> None:
        """Move the sinks among stored keys `[B, Hkv, slots, D]` for `count` queries that follow.

        Args:
            position: of the first query.

        Raises:
            Unsupported: so many queries that the last would see the sinks beyond the reach.
        """
        wanted = self.moved_at(position)
        self._check_distance(position + count - 1 - wanted, count)
        if wanted == self._moved:
            return
        assert self._originals is not None and self.shift is not None
        slots = keys[:, :, : self._sinks]
        before = self._originals if self._moved else slots
        moved = self.shift(before, wanted) if wanted else before
        if not self._moved:
            self._originals.copy_(slots)
        # From here on the originals count: an interrupt leaves keys that the next call rewrites.
        self._moved = -1
        slots.copy_(moved)
        self._moved = wanted

    def originals(self, keys: Tensor) -> Tensor:
        """The sinks `[B, Hkv, sinks, D]` as they were stored."""
        return self._originals if self._moved and self._originals is not None else keys

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self._originals is not None:
            self._originals = self._originals.index_select(0, rows)

    def reset(self) -> None:
        """No sinks are stored any more."""
        self._moved = 0

    def _check_distance(self, farthest: int, count: int) -> None:
        if self.reach is None or not self._sinks or farthest < self.reach + self.block:
            return
        raise Unsupported(
            f"{count} tokens in one call end beyond the {self.reach} positions that this model "
            f"serves, where its {self._sinks} sinks are moved every {self.block} tokens. Read at "
            f"most {self.block} tokens in a call: generate(prefill_chunk_size={self.block}), or "
            "saccade.Context, which does so."
        )

    @property
    def block(self) -> int:
        """Positions of queries that see the sinks at one place."""
        return LARGEST_BLOCK if self.reach is None else max(1, min(LARGEST_BLOCK, self.reach // 4))
