"""The protocol of layer caches: append a chunk, get back the view its queries attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from saccade.core import KVView

ShiftKeys = Callable[[Tensor, int], Tensor]
"""Re-rotate keys `[B, Hkv, n, D]` by a number of positions (saccade.rope.shift_keys, bound)."""


class LayerCache(Protocol):
    """Keys and values of one attention layer.

    Attributes:
        seen: tokens appended so far, which is the position of the next one.
        nbytes: bytes allocated for keys, values and what describes them.
    """

    @property
    def seen(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store keys `[B, Hkv, t, D]` and values `[B, Hkv, t, Dv]`; lend what they attend to.

        The view holds at least every stored key that any of the t new tokens may see under the
        cache's mask, and stays valid until the next append.
        """
        ...

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i] (beam search, batch selection)."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            Unsupported: what would have to come back was overwritten.
        """
        ...

    def drop(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Context shift: forget positions start .. stop-1 and move the later ones down.

        Raises:
            Unsupported: this cache cannot shift.
        """
        ...

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        ...
