"""Our own tasks: an independent reader of the text finds the answer that the task expects."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.evals.tasks.made import samples

LINE = re.compile(r"^(\w+) (\d+): (\w+) ordered (\d+) (\w+)\.$", re.MULTILINE)
YEAR = "July August September October November December".split()
SIZES = [700, 1024, 6000]


def orders(sample):
    found = LINE.findall(sample.context)
    days = [(YEAR.index(month), int(day)) for month, day, *_ in found]
    assert days == sorted(days) and len(found) >= 24
    return found


@pytest.mark.parametrize("tokens", SIZES)
def test_count_and_sum_of_one_person(tokens):
    for name in ("aggregate_count", "aggregate_user"):
        for sample in samples(name, tokens):
            (turn,) = sample.turns
            people = {order[2] for order in orders(sample)}
            (who,) = (person for person in people if re.search(rf"\b{person}\b", turn.question))
            amounts = [int(order[3]) for order in orders(sample) if order[2] == who]
            expected = len(amounts) if name == "aggregate_count" else sum(amounts)
            assert turn.rule == "number" and turn.answers == (str(expected),)
            assert 3 <= len(amounts) <= 9


@pytest.mark.parametrize("tokens", SIZES)
def test_who_and_when_most(tokens):
    for name, field in (("aggregate_compare", 2), ("aggregate_time", 0)):
        for sample in samples(name, tokens, 12):
            (turn,) = sample.turns
            (best, first), (_, second), *_ = Counter(o[field] for o in orders(sample)).most_common()
            assert first > second  # one answer
            assert turn.rule == "first" and turn.answers == (best,) and best in turn.choices
            if field == 2:
                assert all(choice in turn.question for choice in turn.choices)


BORN = re.compile(r"(\w+ \w+) was born in (\w+) in")
TOWN = re.compile(r"(\w+) is a town on the river (\w+)\.")


@pytest.mark.parametrize("tokens", SIZES)
def test_documents(tokens):
    for name in ("qa_fact", "qa_hop"):
        for sample in samples(name, tokens):
            born, rivers = BORN.findall(sample.context), TOWN.findall(sample.context)
            assert len(dict(born)) == len(born) == len(rivers) == len(dict(rivers))
            (turn,) = sample.turns
            (who,) = (person for person, _ in born if person in turn.question)
            town = dict(born)[who]
            expected = town if name == "qa_fact" else dict(rivers)[town]
            assert turn.answers == (expected,) and turn.rule == "part"
            # Another document's answer never contains it.
            names = [*dict(rivers), *dict(rivers).values()]
            assert sum(expected in each for each in names) == 1
            numbers = [int(n) for n in re.findall(r"^Document (\d+):$", sample.context, re.M)]
            assert numbers == list(range(1, 2 * len(born) + 1))


def test_a_conversation_asks_for_every_needle_once():
    for sample in samples("multiturn", 1024):
        found = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", sample.context))
        asked = [re.search(r"number for (\S+) mentioned", t.question)[1] for t in sample.turns]
        assert len(asked) == 4 and set(asked) == set(found)
        assert [t.answers for t in sample.turns] == [(found[key],) for key in asked]
