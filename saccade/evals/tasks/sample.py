"""What a task asks and how an answer is scored.

The rules "all" and "part" are RULER's (string_match_all and string_match_part of
github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py, Apache-2.0, arXiv 2404.06654): an
answer counts where it is contained in what the model wrote, upper and lower case alike.  "number"
and "first" are ours: what was written first counts, so that listing everything earns nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

Rule = Literal["all", "part", "number", "first"]
_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+(?:,\d{3})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question.

    Attributes:
        question: the user's words; prefix: the first words of the answer, given to the model.
        answers: what has to be found in the answer.
        n_predict: most tokens that the model may write.
        rule: "all": the share of `answers` that are contained; "part": whether one is; "number":
            whether the first number is `answers[0]`; "first": whether the first of `choices` that
            appears is `answers[0]`.
    """

    question: str
    prefix: str
    answers: tuple[str, ...]
    n_predict: int
    rule: Rule = "all"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A text and the questions about it, asked one after the other."""

    context: str
    turns: tuple[Turn, ...]


@dataclass(slots=True)
class Room:
    """How long a sample may become.

    Attributes:
        length: most tokens of prompt and answers together.
        count: tokens of a text.
        essay: sentences of running text, for tasks that hide something in one.
        sizes: what a task found out once for all its samples.
    """

    length: int
    count: Callable[[str], int]
    essay: list[str]
    sizes: dict[str, int] = field(default_factory=dict[str, int])


class Task(Protocol):
    """A way to make samples."""

    @property
    def name(self) -> str:
        """What it is called on the command line and in records."""
        ...

    @property
    def least(self) -> int:
        """The smallest `size` that makes sense."""
        ...

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """A sample; the text grows with `size` (lines, words or documents)."""
        ...


def printable(text: str) -> str:
    """An answer as RULER reads it: control characters are line ends, none at start and end."""
    return _CONTROL.sub("\n", text.strip()).strip()


def score(turn: Turn, answer: str) -> float:
    """Of an answer, 0 to 1, by the rule of its question."""
    text = printable(answer).lower()
    if turn.rule in ("all", "part"):
        found = [each.lower() in text for each in turn.answers]
        return sum(found) / len(found) if turn.rule == "all" else float(any(found))
    if turn.rule == "number":
        number = _NUMBER.search(text)
        return float(number is not None and number[0].replace(",", "") == turn.answers[0])
    return float(_first(turn, text) == turn.answers[0])


def settled(turn: Turn, answer: str) -> bool:
    """Whether nothing that follows can change the score, so that writing may end here.

    Containment only ever becomes true; a number has ended once something else follows it.
    """
    text = answer.lower()
    if turn.rule in ("all", "part"):
        return score(turn, answer) == 1.0
    if turn.rule == "number":
        number = _NUMBER.search(text)
        return number is not None and number.end() < len(text) - 1
    return _first(turn, text) is not None


def _first(turn: Turn, text: str) -> str | None:
    """The choice that appears first in a text in lower case; None: none does."""
    places = {choice: text.find(choice.lower()) for choice in turn.choices}
    found = {choice: at for choice, at in places.items() if at >= 0}
    return min(found, key=lambda choice: found[choice]) if found else None
