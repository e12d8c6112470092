"""RULER's variable tracking: a chain of assignments hidden in noise, all of whose names are asked.

Template and counts follow github.com/NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py
(Apache-2.0, arXiv 2404.06654): one chain of four hops, and in front of the text an example of at
most 500 tokens with its answer.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from saccade.evals.tasks.haystack import NOISE, hide_in_lines
from saccade.evals.tasks.sample import Room, Sample, Turn

CONTEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
)
QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables "
    "are assigned the value {query}, they are: "
)
HOPS = 4
GENERATED = 30
EXAMPLE = 500  # most tokens of the example


@dataclass(frozen=True, slots=True)
class Chain:
    """Variable tracking; `size` is the number of lines of noise."""

    name: str = "vt"
    least: int = HOPS + 1

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """An example with its answer, the text, and the question for all five names."""
        context, turn = _tracking(size, 5, rng)
        example = _example(self._example_size(room), rng)
        return Sample(context=f"{example}\n\n{context}", turns=(turn,))

    def _example_size(self, room: Room) -> int:
        """Lines of noise in the example: the most that 500 tokens hold, found once."""
        if self.name not in room.sizes:
            lines = self.least
            while room.count(_example(lines + 1, random.Random(0))) <= EXAMPLE:
                lines += 1
            room.sizes[self.name] = lines
        return room.sizes[self.name]


def _tracking(lines: int, letters: int, rng: random.Random) -> tuple[str, Turn]:
    """A text in which a chain is hidden, and its question."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = str(rng.randrange(10_000, 99_999))
    pairs = pairwise(names)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairs)]
    text = hide_in_lines([NOISE] * lines, chain, rng)
    return CONTEXT.format(context=text), Turn(
        question=QUESTION.format(query=value),
        prefix=PREFIX.format(query=value, num_v=HOPS + 1),
        answers=tuple(names),
        n_predict=GENERATED,
    )


def _example(lines: int, rng: random.Random) -> str:
    """A text with question and answer; its names have three letters."""
    context, turn = _tracking(lines, 3, rng)
    return f"{context}{turn.question} {turn.prefix} {' '.join(turn.answers)}"
