"""Samples are as long as they may be, and the same whenever they are made."""

from __future__ import annotations

import pytest

from saccade.core import BadInput
from saccade.evals.tasks import GROUPS, TASKS, TooShort, chosen, essay_of
from saccade.evals.tasks.haystack import first_words
from saccade.evals.tasks.words import listed_words, word_keys
from tests.evals.tasks.made import length, samples


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [1024, 5000])
def test_lengths(name, tokens):
    found = [length(sample) for sample in samples(name, tokens)]
    assert max(found) <= tokens
    assert min(found) >= 0.9 * tokens - 60  # one line, document or word less is possible


@pytest.mark.parametrize("name", TASKS)
def test_seeds(name):
    first = samples(name, 1024, 3)
    assert samples(name, 1024, 5)[:3] == first  # more samples leave the others as they are
    assert samples(name, 1024, 3, seed=8) != first
    assert len({sample.context for sample in first}) == 3


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(TooShort, match=r"vt needs at least [\d,]+ tokens .* a context of 128\.$"):
        samples("vt", 128)


def test_names_and_groups():
    assert chosen(["vt", "qa", "qa_fact"]) == ["vt", "qa_fact", "qa_hop"]
    assert chosen(["all"]) == list(TASKS) and set(chosen(["niah"])) < set(GROUPS["ruler"])
    with pytest.raises(BadInput, match="no task is called 'nope': expected one of ruler, niah"):
        chosen(["nope"])


def test_words_never_repeat():
    from random import Random

    assert len(set(word_keys(30_000, Random(0)))) == 30_000
    for count in (20, 502, 9000):
        assert len(set(listed_words(count, 10, Random(0)))) == count
    for make in (lambda: word_keys(10**6, Random(0)), lambda: listed_words(10**6, 10, Random(0))):
        with pytest.raises(BadInput, match="ask for a shorter context"):
            make()


def test_an_essay_is_sentences_and_goes_on():
    essay = essay_of()
    assert len(essay) > 500 and not any("|" in each or "::" in each for each in essay)
    words = sum(len(each.split(" ")) for each in essay)
    longer = first_words(essay, words + 25)
    assert sum(len(each.split(" ")) for each in longer) == words + 25 and longer[-1] in " ".join(
        essay
    )
    assert essay_of("One two. Three  four!\nFive?") == ["One two.", "Three four!", "Five?"]
