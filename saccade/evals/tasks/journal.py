"""Aggregation over a list of orders: how many, how much of whom, who has most, in which month.

Every line counts, so a cache that kept only what looks important answers wrongly, where tests of
retrieval still pass.  The lines are made from a seed, and so is the truth.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from saccade.evals.tasks.sample import Room, Sample, Turn

CONTEXT = (
    "Below is a list of orders, one in each line. Memorize it. I will ask a question about all of "
    "the list afterwards.\n{context}\n"
)
PEOPLE: tuple[str, ...] = ("Anna", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo")
GOODS = ("lamps", "chairs", "mirrors", "kettles", "carpets", "vases")
MONTHS = ("July", "August", "September", "October", "November", "December")  # no other words
FEW = (3, 9)  # orders of whoever is counted: as many in a long list as in a short one
GENERATED = 24


class Order(NamedTuple):
    """One line."""

    month: int
    day: int
    person: str
    amount: int
    good: str

    def __str__(self) -> str:
        return f"{MONTHS[self.month]} {self.day}: {self.person} ordered {self.amount} {self.good}."


Asked = Literal["count", "sum", "most", "month"]


@dataclass(frozen=True, slots=True)
class Journal:
    """A question about a list of `size` orders."""

    name: str
    asks: Asked
    least: int = 24

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """The list, in order of time, and the question."""
        people = rng.sample(PEOPLE, 5)
        orders = self._orders(size, people, rng)
        turn = _QUESTIONS[self.asks](orders, people, rng)
        return Sample(CONTEXT.format(context="\n".join(map(str, orders))), (turn,))

    def _orders(self, size: int, people: list[str], rng: random.Random) -> list[Order]:
        """Orders by four people, one of whom has most, and some by a fifth; one month has most."""
        few = min(rng.randint(*FEW), size // 6)  # fewer than a quarter of the rest
        by = [people[0]] * few
        by += rng.choices(people[1:], weights=(3, 2, 2, 2), k=size - few)
        rng.shuffle(by)
        weights = [2] * len(MONTHS)
        weights[rng.randrange(len(MONTHS))] = 5
        months = rng.choices(range(len(MONTHS)), weights=weights, k=size)
        when = sorted((month, rng.randint(1, 28)) for month in months)
        return [
            Order(month, day, person, rng.randint(2, 9), rng.choice(GOODS))
            for (month, day), person in zip(when, by, strict=True)
        ]


def _turn(question: str, how: str, answer: str, choices: tuple[str, ...] = ()) -> Turn:
    return Turn(
        question=f"Question: {question} {how}",
        prefix="Answer:",
        answers=(answer,),
        n_predict=GENERATED,
        rule="first" if choices else "number",
        choices=choices,
    )


_IN_DIGITS = "Answer with one number in digits and nothing else."
_ONE_NAME = "Answer with one name and nothing else."


def _count(orders: list[Order], people: list[str], rng: random.Random) -> Turn:
    number = sum(order.person == people[0] for order in orders)
    return _turn(f"How many lines of the list are by {people[0]}?", _IN_DIGITS, str(number))


def _sum(orders: list[Order], people: list[str], rng: random.Random) -> Turn:
    number = sum(order.amount for order in orders if order.person == people[0])
    asked = f"How many things did {people[0]} order in all, all lines added up?"
    return _turn(asked, _IN_DIGITS, str(number))


def _most(orders: list[Order], people: list[str], rng: random.Random) -> Turn:
    """Who has most lines, of the four that have many."""
    names = tuple(rng.sample(people[1:], 4))
    _break_tie(orders, "person")
    counts = Counter(order.person for order in orders)
    best = max(names, key=lambda name: counts[name])
    asked = f"Who has the most lines in the list: {', '.join(names[:-1])} or {names[-1]}?"
    return _turn(asked, _ONE_NAME, best, names)


def _month(orders: list[Order], people: list[str], rng: random.Random) -> Turn:
    """The month with most lines."""
    _break_tie(orders, "month")
    best = Counter(order.month for order in orders).most_common(1)[0][0]
    asked = "In which month were the most lines of the list written?"
    return _turn(asked, "Answer with the month and nothing else.", MONTHS[best], MONTHS)


def _break_tie(orders: list[Order], field: Literal["person", "month"]) -> None:
    """Give a line of the second most to the most, where both have equally many."""
    (best, first), (other, second), *_ = Counter(
        getattr(order, field) for order in orders
    ).most_common()
    if first == second:
        at = next(i for i, order in enumerate(orders) if getattr(order, field) == other)
        orders[at] = orders[at]._replace(**{field: best})
        orders.sort(key=lambda order: (order.month, order.day))


_QUESTIONS = {"count": _count, "sum": _sum, "most": _most, "month": _month}
JOURNALS = (
    Journal("aggregate_count", "count"),
    Journal("aggregate_user", "sum"),
    Journal("aggregate_compare", "most"),
    Journal("aggregate_time", "month"),
)
