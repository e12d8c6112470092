"""What all layers of a model can do together: read so many tokens, go back to one position."""

from __future__ import annotations

from collections.abc import Sequence

from saccade.cache import LayerCache, SlidingCache, StateCache, SteppingCache


def checkpoint(layers: Sequence[LayerCache]) -> None:
    """Make a checkpoint in every ring and every recurrent layer that keeps any."""
    for layer in layers:
        if isinstance(layer, SlidingCache | StateCache):
            layer.checkpoint()


def queries_alike(layers: Sequence[LayerCache], most: int) -> int:
    """How many of the next tokens, up to `most`, see the sinks of every ring at one place."""
    rings = (layer for layer in layers if isinstance(layer, SlidingCache))
    return min((ring.places.alike(ring.seen, most) for ring in rings), default=most)


def reachable(layers: Sequence[LayerCache], length: int) -> int:
    """The largest position up to `length` that all layers can go back to; 0: only by a reset."""
    while (nearest := min(layer.max_rollback(length) for layer in layers)) < length:
        length = nearest
    return length


def roll_back(layers: Sequence[LayerCache], length: int) -> None:
    """Remove all tokens from a `reachable` position on; 0: everything."""
    for layer in layers:
        if length:
            layer.truncate(length)
        else:
            layer.reset()


def undo_read(layers: Sequence[LayerCache], length: int, *, stepped: bool) -> bool:
    """Bring every layer back to `length` tokens after reading was interrupted.

    Args:
        stepped: by a step, which writes a token in all layers before it counts it in any.  A ring
            has then lost its oldest key, so the token is counted before it is removed.

    Returns:
        False where a layer cannot go back that far; layers may differ afterwards.
    """
    for layer in layers:
        if stepped and layer.seen == length and isinstance(layer, SteppingCache):
            layer.commit(1)
    if min(layer.seen for layer in layers) < length or reachable(layers, length) < length:
        return False
    roll_back(layers, length)
    return True
