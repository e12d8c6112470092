"""Needle retrieval: facts hidden in a long text, and questions that ask for them back.

Keys and values as in RULER's niah_multikey (arXiv 2404.06654), with the text of the comparison as
the haystack. RULER hides sentences; here a fact is an assignment, because a small model reads those
back and loses a digit of a sentence, so that only assignments show what a technique forgets.

A question is asked by giving the answer: where each of its tokens is the most likely one, greedy
decoding would have written the same tokens.  So all questions are read in one go.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import BadInput

Encode = Callable[[str], list[int]]
FEWEST, MOST = 8, 24
_PER_NEEDLE = 64  # tokens of context for each needle: then they are a fifth of the text
_FIRST = (
    *("amber", "quiet", "silver", "rapid", "gentle", "golden", "copper", "crimson"),
    *("frozen", "hidden", "hollow", "ivory", "jade", "lunar", "marble", "misty"),
    *("narrow", "ocean", "proud", "rusty", "scarlet", "sunny", "velvet", "winter"),
)
_SECOND = (
    *("falcon", "harbor", "maple", "canyon", "comet", "garden", "hammer", "island"),
    *("jacket", "kitten", "ladder", "meadow", "needle", "orchard", "pepper", "quarry"),
    *("ribbon", "saddle", "temple", "valley", "walnut", "anchor", "button", "castle"),
)


@dataclass(frozen=True, slots=True)
class Needle:
    """One hidden fact: `sentence` goes into the text, `question` asks, `value` is the answer."""

    sentence: str
    question: str
    value: str


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens of a question with its answer; those from `answer` on are the answer."""

    tokens: list[int]
    answer: int


def needles_for(context: int) -> int:
    """How many needles a context of so many tokens takes: 8 to 24."""
    return min(MOST, max(FEWEST, context // _PER_NEEDLE))


def make_needles(count: int, seed: int = 0) -> list[Needle]:
    """`count` (at most 24) facts with four-digit values, all different."""
    values = random.Random(seed).sample(range(1000, 10_000), count)
    keys = [f"{a}-{b}" for a, b in zip(_FIRST[:count], _SECOND, strict=False)]
    return [Needle(f"\n{k} = {v}\n", f"\n{k} =", str(v)) for k, v in zip(keys, values, strict=True)]


def questions(needles: Sequence[Needle], encode: Encode, seed: int = 1) -> list[Question]:
    """The questions with their answers, not in the order of the text."""
    asked = list(needles)
    random.Random(seed).shuffle(asked)
    return [_question(needle, encode) for needle in asked]


def _question(needle: Needle, encode: Encode) -> Question:
    """The answer begins where the tokens of the question alone end, or differ."""
    alone = encode(needle.question)
    whole = encode(f"{needle.question} {needle.value}")
    pairs = enumerate(zip(alone, whole, strict=False))
    answer = next((at for at, (a, b) in pairs if a != b), min(len(alone), len(whole) - 1))
    return Question(whole, answer)


def answered(asked: Sequence[Question], best: Tensor) -> list[bool]:
    """Whether each answer is what greedy decoding would have written.

    Args:
        best: int64 `[n]`, the most likely token behind each token of the questions, in a row.
    """
    found: list[bool] = []
    start = 0
    for question in asked:
        wanted = question.tokens[question.answer :]
        first = start + question.answer - 1
        found.append(torch.equal(best[first : first + len(wanted)], torch.tensor(wanted)))
        start += len(question.tokens)
    return found


def hide(
    tokens: Sequence[int], needles: Sequence[Needle], encode: Encode, length: int
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
