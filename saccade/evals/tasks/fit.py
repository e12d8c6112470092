"""How much text fits into a length of so many tokens: the largest, found by trying."""

from __future__ import annotations

import random
from collections.abc import Callable

from saccade.core import BadInput
from saccade.evals.tasks.sample import Room, Sample, Task

Length = Callable[[Sample], int]
"""Tokens of a sample's whole prompt and of all that the model may write."""


class TooShort(BadInput):
    """Not even the smallest text of a task fits.

    Attributes:
        needed: tokens of that text.
    """

    def __init__(self, name: str, needed: int, length: int) -> None:
        super().__init__(
            f"{name} needs at least {needed:,} tokens with this tokenizer, got a context of "
            f"{length:,}."
        )
        self.needed = needed


def samples_of(task: Task, count: int, seed: int, room: Room, length: Length) -> list[Sample]:
    """`count` samples, each as long as fits; the same seed gives the same ones.

    Sample i depends on the seed, the task, the length and i alone, so that more of them can be
    made later.

    Raises:
        TooShort: the length holds no sample.
    """
    size = _largest(task, seed, room, length)
    return [_sample(task, size, _rng(task, seed, room, at), room, length) for at in range(count)]


def _rng(task: Task, seed: int, room: Room, index: int) -> random.Random:
    return random.Random(f"{seed} {task.name} {room.length} {index}")


def _largest(task: Task, seed: int, room: Room, length: Length) -> int:
    """The size at which the first sample fits, and one more does not."""

    def tokens(size: int) -> int:
        return length(task.make(size, _rng(task, seed, room, 0), room))

    if (needed := tokens(task.least)) > room.length:
        raise TooShort(task.name, needed, room.length)
    low, high = task.least, 2 * task.least
    while tokens(high) <= room.length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room.length else (low, middle)
    return low


def _sample(task: Task, size: int, rng: random.Random, room: Room, length: Length) -> Sample:
    """A sample of that size, or of the next smaller one that fits."""
    state = rng.getstate()
    while True:
        rng.setstate(state)
        sample = task.make(size, rng, room)
        if (needed := length(sample)) <= room.length:
            return sample
        if size == task.least:
            raise TooShort(task.name, needed, room.length)
        size = max(task.least, size - max(1, size // 100))
