"""Texts in which something is hidden, and where it is put, as in RULER's niah.py."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise

from saccade.evals.text import default_text

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(at * 100 / 39) for at in range(40))
"""Per cent of an essay at which a sentence may be put: 40, evenly spaced."""
_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")
_MARKUP = re.compile(r"[|*=`{}<>\\]|::")


def essay_of(text: str | None = None) -> list[str]:
    """Sentences of a text, default: of Python's help topics, without tables and code.

    RULER reads Paul Graham's essays here, which are not free to give away.
    """
    prose = _prose(default_text()) if text is None else text
    return _END.split(" ".join(prose.split()))


def _prose(text: str) -> str:
    """The paragraphs that are sentences and little else."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return " ".join(
        each for each in paragraphs
        if each.endswith(".") and each[0].isupper() and len(each.split()) > 12
        and not _MARKUP.search(each)
    )  # fmt: skip


def first_words(sentences: Sequence[str], count: int) -> list[str]:
    """Sentences with `count` words together, from the start; repeated where the text ends."""
    taken: list[str] = []
    left = count
    while left > 0:
        for sentence in sentences:
            words = sentence.split(" ")
            taken.append(" ".join(words[:left]))
            left -= len(words)
            if left <= 0:
                break
    return taken


def hide_in_essay(sentences: Sequence[str], hidden: Sequence[str], rng: random.Random) -> str:
    """The essay with each hidden sentence between two of its own, at different depths."""
    depths = sorted(rng.sample(DEPTHS, len(hidden)))
    cuts = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    parts: list[str] = []
    for index, (start, end) in enumerate(pairwise(cuts)):
        parts += [" ".join(sentences[start:end]), *hidden[index : index + 1]]
    return " ".join(part for part in parts if part)


def hide_in_lines(lines: Sequence[str], hidden: Sequence[str], rng: random.Random) -> str:
    """Lines with the hidden ones put in front of random others, in their own order."""
    places = sorted(rng.sample(range(len(lines)), len(hidden)))
    out = list(lines)
    for moved, (place, line) in enumerate(zip(places, hidden, strict=True)):
        out.insert(place + moved, line)
    return "\n".join(out)
