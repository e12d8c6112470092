"""Checkpoints of a sliding window: what it held at some positions, to come back to them.

Keys before a window are overwritten, so a ring alone can hardly roll back.  A checkpoint copies the
window before a position, which is enough to go on from there: prompts with a common prefix read it
once.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from saccade.core import Unsupported

Kept = TypeVar("Kept", bound=tuple[Tensor, ...])


class Checkpoints(Generic[Kept]):
    """Copies by position, ascending.

    Args:
        most: how many are kept; where there are too many, the one closest to its neighbours is
            freed, never the newest.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[int, Kept] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(x.nbytes for copy in self.kept.values() for x in copy)

    def wants(self, position: int) -> bool:
        """Whether a checkpoint at `position` is to be made."""
        return self.most > 0 and position not in self.kept

    def add(self, position: int, copy: Kept) -> None:
        """Keep a copy, behind all others."""
        self.kept[position] = copy
        if len(self.kept) > self.most:
            at = [0, *self.kept]
            closest = min(zip(at[2:], at, at[1:], strict=False), key=lambda x: x[0] - x[1])
            del self.kept[closest[2]]

    def last(self, length: int) -> int:
        """The last position up to `length` that has one, or 0."""
        return max((at for at in self.kept if at <= length), default=0)

    def forget_after(self, length: int) -> None:
        """Remove those behind position `length`."""
        self.kept = {at: copy for at, copy in self.kept.items() if at <= length}


def check_behind_sinks(start: int, sinks: int) -> None:
    """Raise Unsupported for a context shift that would remove sinks."""
    if start < sinks:
        raise Unsupported(
            f"a ring cache keeps its {sinks} sinks, so it cannot remove tokens from "
            f"position {start} on. Set n_keep to at least the sinks."
        )


def missing_window(oldest: int, seen: int, window: int, length: int, kept: list[int]) -> str:
    """Why a ring cannot go back to position `length`, and what to do."""
    return (
        f"the ring cache cannot go back to position {length}: it holds positions {oldest} to "
        f"{seen - 1} and needs the {window} before, and its checkpoints are at "
        f"{kept or 'no position'}. Set ctx_checkpoints, or reset the cache and read the prompt "
        "again."
    )
