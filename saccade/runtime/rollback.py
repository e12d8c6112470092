"""Going back in all layers at once, as far as every one of them can."""

from __future__ import annotations

from collections.abc import Sequence

from saccade.cache import LayerCache, RingCache


def checkpoint(layers: Sequence[LayerCache]) -> None:
    """Let sliding layers remember this position, where they were told to."""
    for layer in layers:
        if isinstance(layer, RingCache):
            layer.checkpoint()


def roll_back(layers: Sequence[LayerCache], length: int) -> int:
    """Forget all tokens from position `length` on, or from the last one before that all can reach.

    Returns:
        The position that was reached; 0 forgets everything.
    """
    while (nearest := min(layer.max_rollback(length) for layer in layers)) < length:
        length = nearest
    for layer in layers:
        if length:
            layer.truncate(length)
        else:
            layer.reset()
    return length
