"""Questions about documents, in the words of RULER's qa tasks, whose documents need a download.

Ours are short lives of people and descriptions of towns, made from a seed.  `qa_fact` asks for what
one document says, `qa_hop` for what two say together: where somebody was born, and what is there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from saccade.core import BadInput
from saccade.evals.tasks.sample import Room, Sample, Turn

_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
CONTEXT = f"{_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n"
QUESTION = f"{_ASK}\n\nQuestion: {{query}}"
PREFIX = "Answer:"
GENERATED = 32
FIRST = (
    *("Adela", "Bruno", "Carmen", "Dario", "Edith", "Fabian", "Gloria", "Henrik", "Ingrid"),
    *("Jonas", "Karin", "Lorenz", "Marta", "Nestor", "Olga", "Pablo", "Rosa", "Stefan"),
    *("Teresa", "Ulrich", "Vera", "Walter", "Yvonne", "Zoltan"),
)
_SOUNDS = tuple("Bar Cor Del Fen Gal Hus Jor Kel Lim Mot Nid Pes Quil Rov Sut Tam Ulm Vex Wol "
                "Yar Zem Brad Cryn Dros".split())  # fmt: skip
_MIDDLE = ("a", "e", "i", "o")
_TOWN_ENDS = ("ford", "wick", "burg", "stad", "mere", "haven")
_RIVER_ENDS = ("va", "sa", "na", "ra", "lva", "lna")
_NAME_ENDS = ("ski", "sen", "man", "ini", "ez", "ov")
_JOBS = (
    *("baker", "carpenter", "glassblower", "botanist", "surveyor", "violinist", "printer"),
    *("sailor", "clockmaker", "teacher", "architect", "astronomer", "tailor", "librarian"),
)
_THINGS = ("bridges", "gardens", "mills", "markets", "orchards", "libraries", "towers", "harbors")
MOST = 500  # people and as many towns: then no two names are equal


@dataclass(frozen=True, slots=True)
class Documents:
    """Questions about `size` pairs of documents, a person's and a town's."""

    name: str
    hops: int
    least: int = 2

    def make(self, size: int, rng: random.Random, room: Room) -> Sample:
        """The documents in random order, and the question about one of the people.

        Raises:
            BadInput: more documents than there are names for.
        """
        if size > MOST:
            raise BadInput(
                f"{self.name} has names for {2 * MOST} documents, a text this long needs more: ask "
                "for a shorter context."
            )
        towns = _names(_TOWN_ENDS, size, rng)
        rivers = _names(_RIVER_ENDS, size, rng)
        people = [f"{rng.choice(FIRST)} {last}" for last in _names(_NAME_ENDS, size, rng)]
        texts = [_life(person, town, rng) for person, town in zip(people, towns, strict=True)]
        texts += [_town(town, river, rng) for town, river in zip(towns, rivers, strict=True)]
        rng.shuffle(texts)
        listed = "\n\n".join(f"Document {at}:\n{text}" for at, text in enumerate(texts, start=1))
        asked = rng.randrange(size)
        query, answer = f"In which town was {people[asked]} born?", towns[asked]
        if self.hops > 1:
            query = f"Which river flows through the town where {people[asked]} was born?"
            answer = rivers[asked]
        turn = Turn(
            question=QUESTION.format(query=query),
            prefix=PREFIX,
            answers=(answer,),
            n_predict=GENERATED,
            rule="part",
        )
        return Sample(CONTEXT.format(context=listed), (turn,))


def _names(ends: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Different made-up names, none a part of another."""
    stems = [sound + middle for sound in _SOUNDS for middle in _MIDDLE]
    return rng.sample([f"{stem}{end}" for stem in stems for end in ends], count)


def _life(person: str, town: str, rng: random.Random) -> str:
    born, job, other = rng.randint(1800, 1950), rng.choice(_JOBS), rng.choice(_JOBS)
    return (
        f"{person} was born in {town} in {born}. At first {_a(job)}, {person.partition(' ')[0]} "
        f"became known as {_a(other)} and retired in {born + rng.randint(50, 70)}."
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _town(town: str, river: str, rng: random.Random) -> str:
    things, founded = rng.sample(_THINGS, 2), rng.randint(1100, 1750)
    return (
        f"{town} is a town on the river {river}. It was founded in {founded} and is famous for its "
        f"{things[0]} and {things[1]}."
    )


DOCUMENTS = (Documents("qa_fact", 1), Documents("qa_hop", 2))
