"""What all caches of a sliding window have in common, whatever they store."""

from __future__ import annotations

from abc import ABC, abstractmethod

from saccade.cache.sinks import SinkPlaces


class SlidingCache(ABC):
    """A layer cache that keeps the last tokens and the first ones.

    Attributes:
        places: where the keys of the sinks stand, as stored until it is told to move them.
    """

    places: SinkPlaces

    @property
    @abstractmethod
    def most_checkpoints(self) -> int:
        """How many checkpoints it keeps."""

    @abstractmethod
    def checkpoint(self) -> None:
        """Make it possible to come back to this position."""
