"""Rolling back all layers of a model to one position that each of them can reach."""

from __future__ import annotations

from collections.abc import Sequence

from saccade.cache import LayerCache, RingCache, StateCache


def checkpoint(layers: Sequence[LayerCache]) -> None:
    """Make a checkpoint in every ring and every recurrent layer that keeps any."""
    for layer in layers:
        if isinstance(layer, RingCache | StateCache):
            layer.checkpoint()


def roll_back(layers: Sequence[LayerCache], length: int) -> int:
    """Remove all tokens from position `length` on, or from the last one before that all can reach.

    Returns:
        The position that was reached; 0: everything was removed.
    """
    while (nearest := min(layer.max_rollback(length) for layer in layers)) < length:
        length = nearest
    for layer in layers:
        if length:
            layer.truncate(length)
        else:
            layer.reset()
    return length
