"""RULER's needles in a haystack: sentences hidden in a text, of which some are asked for.

Templates, counts and what is hidden follow github.com/NVIDIA/RULER, scripts/synthetic.yaml and
scripts/data/synthetic/niah.py (Apache-2.0, arXiv 2404.06654).  What differs: words and essay are
our own, and no two keys of a text are equal, so every question has one answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from saccade.evals.tasks.haystack import NOISE, first_words, hide_in_essay, hide_in_lines
from saccade.evals.tasks.sample import Room, Sample, Turn
from saccade.evals.tasks.words import numbers, uuids, word_keys

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text are",
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text is",
)
"""Before the text, the question, and how its answer begins; RULER's rewording for one answer."""
GENERATED = 128
_MAKE = {"words": word_keys, "numbers": numbers, "uuids": uuids}


@dataclass(frozen=True, slots=True, kw_only=True)
class Niah:
    """A needle task.

    Attributes:
        haystack: "noise" (one line again and again), "essay", or "needles" (other needles).
        keys, values: what they are; num_keys: needles with different keys; num_values: of each
            key; num_queries: keys that are asked for.
        in_turns: a question for each key, one after the other, in one conversation.
    """

    name: str
    haystack: Literal["noise", "essay", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    in_turns: bool = False

    @property
    def least(self) -> int:
        return 50 if self.haystack == "essay" else self.num_keys * self.num_values

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        others = size if self.haystack == "needles" else 0
        keys = _MAKE[self.keys](self.num_keys + others, rng)
        drawn = _MAKE[self.values](self.num_keys * self.num_values + others, rng)
        asked, others_keys = keys[: self.num_keys], keys[self.num_keys :]
        values = {
            key: drawn[at * self.num_values : (at + 1) * self.num_values]
            for at, key in enumerate(asked)
        }
        hidden = [self._needle(key, value) for key in asked for value in values[key]]
        rng.shuffle(hidden)
        rest = drawn[self.num_keys * self.num_values :]
        noise = [self._needle(key, value) for key, value in zip(others_keys, rest, strict=True)]
        text = self._text(size, hidden, noise, rng, room)
        wanted = rng.sample(asked, self.num_queries)
        kind, (before, _, _) = self._wording(self.num_keys if self.in_turns else self.num_queries)
        turns = [[key] for key in wanted] if self.in_turns else [wanted]
        return Sample(
            context=f"{before.format(kind=kind)}{text}\n",
            turns=tuple(self._turn(keys, values) for keys in turns),
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _text(
        self, size: int, hidden: list[str], noise: list[str], rng: random.Random, room: Room
    ) -> str:
        if self.haystack == "essay":
            return hide_in_essay(first_words(room.essay, size), hidden, rng)
        return hide_in_lines(noise or [NOISE] * size, hidden, rng)

    def _wording(self, queries: int) -> tuple[str, tuple[str, str, str]]:
        """What the values are called, and the template, for one answer or several."""
        if queries * self.num_values == 1:
            return self.values.removesuffix("s"), ONE
        return self.values, MANY

    def _turn(self, keys: list[str], values: dict[str, list[str]]) -> Turn:
        kind, (_, question, prefix) = self._wording(len(keys))
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        return Turn(
            question=question.format(kind=kind, query=query),
            prefix=prefix.format(kind=kind, query=query),
            answers=tuple(value for key in keys for value in values[key]),
            n_predict=GENERATED if not self.in_turns else GENERATED // 4,
        )


NIAH = (
    Niah(name="niah_single_1", haystack="noise"),
    Niah(name="niah_single_2", haystack="essay"),
    Niah(name="niah_single_3", haystack="essay", values="uuids"),
    Niah(name="niah_multikey_1", haystack="essay", num_keys=4),
    Niah(name="niah_multikey_2", haystack="needles"),
    Niah(name="niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
    Niah(name="niah_multivalue", haystack="essay", num_values=4),
    Niah(name="niah_multiquery", haystack="essay", num_keys=4, num_queries=4),
)
MULTITURN = Niah(name="multiturn", haystack="essay", num_keys=4, num_queries=4, in_turns=True)
