"""Needle retrieval: facts hidden in a long text, and questions that ask for them back.

Keys and values as in RULER's niah_multikey (arXiv 2404.06654), with the text of the comparison as
the haystack. RULER hides sentences; here a fact is an assignment, because a small model reads those
back from 256 to 6000 tokens and loses a digit of a sentence, so that only assignments show what a
technique forgets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saccade.core import BadInput

KEYS = ("amber-falcon", "quiet-harbor", "silver-maple", "rapid-canyon", "gentle-comet")


@dataclass(frozen=True, slots=True)
class Needle:
    """One hidden fact: `sentence` goes into the text, `question` asks, `value` is the answer."""

    sentence: str
    question: str
    value: str


def make_needles(count: int, seed: int = 0) -> list[Needle]:
    """`count` (at most 5) facts with seven-digit values."""
    rng = random.Random(seed)
    needles = []
    for key in KEYS[:count]:
        value = str(rng.randrange(1_000_000, 10_000_000))
        needles.append(Needle(f"\n{key} = {value}\n", f"\n{key} =", value))
    return needles


def hide(
    tokens: Sequence[int],
    needles: Sequence[Needle],
    encode: Callable[[str], list[int]],
    length: int,
) -> list[int]:
    """Exactly `length` tokens: the start of the text with the needles spread evenly through it.

    Raises:
        BadInput: a text too short for that length.
    """
    hidden = [encode(needle.sentence) for needle in needles]
    room = length - sum(map(len, hidden))
    if room < len(needles) or len(tokens) < room:
        raise BadInput(
            f"the text has {len(tokens)} tokens, a context of {length} needs at least {room}. "
            "Give a longer text or a smaller context."
        )
    out: list[int] = []
    at = 0
    for i, sentence in enumerate(hidden):
        depth = (2 * i + 1) * room // (2 * len(hidden))
        out += [*tokens[at:depth], *sentence]
        at = depth
    return [*out, *tokens[at:room]]
