"""Scores against cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from saccade.evals.tasks.sample import Turn, printable, score, settled


def turn(rule, *answers, choices=()):
    return Turn(question="", prefix="", answers=answers, n_predict=1, rule=rule, choices=choices)


NAMES = ("Anna", "Boris")
CASES = [
    (turn("all", "123", "456"), "they are 123 and 456.", 1.0),
    (turn("all", "123", "456"), "456", 0.5),
    (turn("all", "123", "456", "789", "000"), "0001237", 0.5),  # contained is enough
    (turn("all", "AbC"), "xabcx", 1.0),  # upper and lower case alike
    (turn("all", "123"), "", 0.0),
    (turn("all", "12\n3"), " 12\x013 ", 1.0),  # control characters are line ends
    (turn("part", "river", "stream"), "A Stream.", 1.0),
    (turn("part", "river", "stream"), "a lake", 0.0),
    (turn("number", "3"), "3", 1.0),
    (turn("number", "3"), "13", 0.0),  # containment would count this
    (turn("number", "3"), "There are 3, not 13.", 1.0),
    (turn("number", "3"), "13, not 3", 0.0),
    (turn("number", "1234"), "1,234 lines", 1.0),
    (turn("number", "3"), "three", 0.0),
    (turn("first", "Boris", choices=NAMES), "boris, then Anna", 1.0),
    (turn("first", "Boris", choices=NAMES), "Anna or Boris", 0.0),
    (turn("first", "Boris", choices=NAMES), "nobody", 0.0),
]


@pytest.mark.parametrize(("asked", "answer", "expected"), CASES)
def test_scores(asked, answer, expected):
    assert score(asked, answer) == expected


def test_an_answer_as_ruler_reads_it():
    assert printable("\t a\x00b\x1f ") == "a\nb"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_settled_never_changes(seed):
    """Whatever is written behind an answer that is settled, its score stays."""
    rng = random.Random(seed)
    pieces = ["1", "2", "3", " ", ",", "Anna", "Boris", "x", "\n", "23", "."]
    asked = [turn("all", "12", "3"), turn("part", "23", "x1"), turn("number", "12"),
             turn("first", "Boris", choices=NAMES)]  # fmt: skip
    for each in asked:
        text, at = "", None
        for _ in range(40):
            text += rng.choice(pieces)
            if at is None and settled(each, text):
                at = score(each, text)
            assert at is None or score(each, text) == at, (each, text)
