"""The newest tokens of a quantized cache, in 16 bits, until a full group of them is quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.base import chosen_rows, fits

STEP = 16
"""Slots by which the buffer of the newest tokens grows."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """16 bits: float32 as float16, whose range quantized caches are bound to by their scales.

    (float16 rounds to 11 bits, bfloat16 to 8: as coarse as int8.)
    """
    return dtype if dtype.itemsize <= 2 else torch.float16


def room_for(tokens: int, most: int) -> int:
    """Slots for so many tokens, at most `most` where those are enough."""
    return max(min(-(-tokens // STEP) * STEP, most), tokens)


class RecentTokens:
    """Keys and values of the newest `length` tokens.

    Args:
        most: slots that are ever needed.

    Attributes:
        stays: the buffer keeps its size and address, for captured steps; else it grows with its
            tokens and shrinks again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.length, self.stays = most, 0, False
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The buffers; none before `allocate`."""
        return () if self.k is None or self.v is None else (self.k, self.v)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Both, after `allocate`."""
        assert self.k is not None and self.v is not None
        return self.k, self.v

    @property
    def slots(self) -> int:
        """Slots that are allocated."""
        return 0 if self.k is None else self.k.shape[2]

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """The tokens, in place."""
        assert self.k is not None and self.v is not None
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def fits(self, k: Tensor, v: Tensor) -> bool:
        """Whether a chunk has the sizes and device of the buffers, if there are any."""
        return fits(k, self.k) and fits(v, self.v)

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Empty buffers for keys and values like these, where there are none yet."""
        if self.k is None:
            dtype = stored_dtype(k.dtype)
            self.k, self.v = (x[:, :, :0].to(dtype, copy=True) for x in (k, v))

    def free(self) -> None:
        """Remove everything, memory included."""
        self.k = self.v = None
        self.length = 0

    def make_room(self, tokens: int) -> None:
        """Slots for so many tokens."""
        if tokens > self.slots:
            self._move(tokens, *self.filled)

    def stay(self) -> None:
        """Allocate all slots and keep them where they are."""
        self.stays = True
        self.make_room(self.most)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store a chunk behind the others."""
        stop = self.length + k.shape[2]
        self.make_room(stop)
        assert self.k is not None and self.v is not None
        self.k[:, :, self.length : stop] = k
        self.v[:, :, self.length : stop] = v
        self.length = stop

    def replace(self, k: Tensor, v: Tensor) -> None:
        """Store these tokens, which lie elsewhere, in place of all others."""
        if self._slots_for(k.shape[2]) == self.slots:
            self.length = 0
            return self.append(k, v)
        return self._move(k.shape[2], k, v)

    def restore(self, k: Tensor, v: Tensor) -> None:
        """Store these tokens of a saved cache, whose dtype stays."""
        self.k, self.v = k[:, :, :0], v[:, :, :0]
        self._move(k.shape[2], k, v)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]."""
        if self.k is not None and self.v is not None:
            self.k, self.v = chosen_rows(self.k, rows), chosen_rows(self.v, rows)

    def _move(self, room: int, k: Tensor, v: Tensor) -> None:
        """New buffers with room for so many tokens, which begin with these."""
        assert self.k is not None and self.v is not None
        slots = self._slots_for(room)
        new_k, new_v = (x.new_empty(*x.shape[:2], slots, x.shape[3]) for x in (self.k, self.v))
        new_k[:, :, : k.shape[2]] = k
        new_v[:, :, : v.shape[2]] = v
        self.k, self.v, self.length = new_k, new_v, k.shape[2]

    def _slots_for(self, tokens: int) -> int:
        return max(tokens, self.most) if self.stays else room_for(tokens, self.most)
