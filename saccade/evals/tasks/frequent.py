"""RULER's aggregation: the most common words of a list, and of a text in a made-up language.

Templates and counts follow github.com/NVIDIA/RULER, scripts/data/synthetic/
common_words_extraction.py and freq_words_extraction.py (Apache-2.0, arXiv 2404.06654).
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass

from saccade.evals.tasks.sample import Room, Sample, Turn
from saccade.evals.tasks.words import listed_words

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n",
    "Question: What are the 10 most common words in the above list?",
    "Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\n",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    "Answer: According to the coded text above, the three most frequently appeared words are:",
)
NUM_COMMON = 10
SHORT = 4096  # below this many tokens common words appear 6 times and others once
ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True, slots=True)
class CommonWords:
    """Ten words appear 30 times, others 3 times; `size` is the number of different words."""

    name: str = "cwe"
    least: int = 2 * NUM_COMMON

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """A small example with its answer, then the list."""
        short = room.length < SHORT
        shown, answer = word_list(20, 3, 1, rng) if short else word_list(40, 10, 3, rng)
        text, common = word_list(size, 6, 1, rng) if short else word_list(size, 30, 3, rng)
        context, question, prefix = COMMON
        example = f"{context.format(context=shown)}{question} {prefix} {numbered(answer)}"
        return Sample(
            context=f"{example}\n{context.format(context=text)}",
            turns=(Turn(question=question, prefix=prefix, answers=common, n_predict=120),),
        )


def numbered(words: list[str] | tuple[str, ...]) -> str:
    """`1. first 2. second`."""
    return " ".join(f"{at}. {word}" for at, word in enumerate(words, start=1))


def word_list(
    different: int, common: int, uncommon: int, rng: random.Random
) -> tuple[str, tuple[str, ...]]:
    """A numbered list in random order, and the ten words that are in it `common` times."""
    words = listed_words(different, NUM_COMMON, rng)
    listed = words[:NUM_COMMON] * common + words[NUM_COMMON:] * uncommon
    rng.shuffle(listed)
    return numbered(listed), tuple(words[:NUM_COMMON])


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """Words of six letters whose number falls with the square of their rank (a Zeta distribution).

    `size` is the number of words that are drawn; the first rank is written as dots.
    """

    name: str = "fwe"
    least: int = 90  # then ranks 2, 3 and 4 appear more often than rank 5: 13, 6, 3 and 2 times

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """The coded text and the question for ranks 2 to 4."""
        vocabulary = max(5, (room.length - GENERATED) // 50)
        words: list[str] = []
        while len(words) < vocabulary:
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            words += [] if word in words else [word]
        ranked = ["...", *words[1:]]
        counts = [int(size / rank**2 / ZETA_2) for rank in range(1, vocabulary + 1)]
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        context, question, prefix = FREQUENT
        turn = Turn(
            question=question, prefix=prefix, answers=tuple(ranked[1:4]), n_predict=GENERATED
        )
        return Sample(context=context.format(context=" ".join(text)), turns=(turn,))


GENERATED = 50
