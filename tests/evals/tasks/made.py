"""Samples of every task, made with a tokenizer of about four characters a token."""

from __future__ import annotations

from saccade.evals.tasks import TASKS, Room, Sample, essay_of, samples_of

ESSAY = essay_of()


def count(text: str) -> int:
    return -(-len(text) // 4)


def length(sample: Sample) -> int:
    """Tokens of all texts and of all that may be written."""
    asked = sum(count(turn.question + turn.prefix) + turn.n_predict for turn in sample.turns)
    return count(sample.context) + asked


def samples(name: str, tokens: int, number: int = 4, seed: int = 7) -> list[Sample]:
    room = Room(tokens, count, ESSAY)
    return samples_of(TASKS[name], number, seed, room, length)
