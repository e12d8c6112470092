"""RULER's tasks: the answers are found in the generated text by an independent reader."""

from __future__ import annotations

import re
from collections import Counter
from math import pi

import pytest

from saccade.evals.tasks import GROUPS
from saccade.evals.tasks.haystack import NOISE
from tests.evals.tasks.made import ESSAY, count, samples

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
NUMBER = re.compile(r"[1-9]\d{6}")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
WORDS = re.compile(r"[a-z]+-[a-z]+")
# From RULER's scripts/synthetic.yaml: haystack, form of keys and values, hidden, asked answers.
NEEDLES = {
    "niah_single_1": ("noise", WORDS, NUMBER, 1, 1),
    "niah_single_2": ("essay", WORDS, NUMBER, 1, 1),
    "niah_single_3": ("essay", WORDS, UUID, 1, 1),
    "niah_multikey_1": ("essay", WORDS, NUMBER, 4, 1),
    "niah_multikey_2": ("needles", WORDS, NUMBER, None, 1),
    "niah_multikey_3": ("needles", UUID, UUID, None, 1),
    "niah_multivalue": ("essay", WORDS, NUMBER, 4, 4),
    "niah_multiquery": ("essay", WORDS, NUMBER, 4, 4),
}


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_needles(name, tokens):
    haystack, key_form, value_form, hidden, wanted = NEEDLES[name]
    for sample in samples(name, tokens):
        found = NEEDLE.findall(sample.context)
        assert hidden is None or len(found) == hidden
        assert all(key_form.fullmatch(k) and value_form.fullmatch(v) for _, k, v in found)
        (turn,) = sample.turns
        asked = [k for k in dict.fromkeys(k for _, k, _ in found) if k in turn.question]
        assert Counter(turn.answers) == Counter(v for _, k, v in found if k in asked)
        assert len(turn.answers) == wanted and turn.n_predict == 128 and turn.rule == "all"
        assert (NOISE in sample.context) == (haystack == "noise")
        assert (ESSAY[0] in sample.context) == (haystack == "essay")


def test_needle_templates_word_for_word():
    """As RULER's constants.py and its rewording for one answer give them."""
    (one,), (many,) = samples("niah_single_2", 1024, 1), samples("niah_multiquery", 1024, 1)
    assert one.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\n"
    )
    (turn,) = one.turns
    assert re.fullmatch(
        r"What is the special magic number for \S+ mentioned in the provided text\?", turn.question
    )
    assert many.context.startswith("Some special magic numbers are hidden within")
    assert re.fullmatch(
        r"The special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided text are",
        many.turns[0].prefix,
    )


def test_no_two_keys_are_equal():
    (sample,) = samples("niah_multikey_2", 16_384, 1)
    keys = [key for _, key, _ in NEEDLE.findall(sample.context)]
    assert len(keys) > 500 and len(set(keys)) == len(keys)


def test_a_haystack_of_noise_is_nothing_else():
    (sample,) = samples("niah_single_1", 2048, 1)
    lines = sample.context.splitlines()[1:]
    assert Counter(lines)[NOISE] == len(lines) - 1


@pytest.mark.parametrize("tokens", [1500, 4096])
def test_variable_tracking(tokens):
    for sample in samples("vt", tokens):
        example, text = re.split(r"(?<=\S)\n\n(?=Memorize)", sample.context)
        assert count(example) <= 500
        (turn,) = sample.turns
        value = re.search(r"assigned the value (\d{5})", turn.question)[1]
        lines = [line for line in text.splitlines() if line.startswith("VAR")]
        assert len(lines) == 5 and set(text.splitlines()[2:]) - {NOISE} == set(lines)
        holds: list[str] = []
        for line in lines:  # in order, so each name is known when it is assigned
            name, right = re.fullmatch(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+) ?", line).groups()
            if right == value or right in holds:
                holds.append(name)
        assert tuple(holds) == turn.answers
        shown = re.search(r"they are:\s+((?:[A-Z]{3} ?){5})$", example)[1].split()
        assert set(shown) == set(re.findall(r"VAR ([A-Z]{3}) =", example))


@pytest.mark.parametrize(("tokens", "counts"), [(2048, {6, 1}), (4096, {30, 3})])
def test_common_words(tokens, counts):
    for sample in samples("cwe", tokens):
        example, text = sample.context.split("\nBelow", maxsplit=1)
        listed = Counter(re.findall(r"\d+\. ([a-z]+)", text))
        assert set(listed.values()) == counts
        top = [word for word, number in listed.items() if number == max(counts)]
        (turn,) = sample.turns
        assert len(turn.answers) == 10 and set(top) == set(turn.answers)
        assert not any(a in b for a in turn.answers for b in listed if a != b)
        numbers = [int(n) for n in re.findall(r"(\d+)\. ", text)]
        assert numbers == list(range(1, len(numbers) + 1))
        words, answer = example.split("Answer:")
        shown = Counter(re.findall(r"\d+\. ([a-z]+)", words))
        best = shown.most_common(10)
        assert len({number for _, number in best}) == 1
        assert {word for word, _ in best} == set(re.findall(r"\d+\. ([a-z]+)", answer))


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_frequent_words(tokens):
    for sample in samples("fwe", tokens):
        body = sample.context.split("coded words. ")[1]
        counts = Counter(body.split())
        ranked = [word for word, _ in counts.most_common(4)]
        (turn,) = sample.turns
        assert ranked[0] == "..." and tuple(ranked[1:]) == turn.answers
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts if word != "...")
        drawn = [number for _, number in counts.most_common()]
        # The number of words that were drawn follows from the first rank, up to rounding.
        low, high = drawn[0] * pi**2 / 6, (drawn[0] + 1) * pi**2 / 6
        for rank, number in enumerate(drawn, start=1):
            assert int(low / rank**2 * 6 / pi**2) <= number <= high / rank**2 * 6 / pi**2
        assert drawn[3] > (drawn[4] if len(drawn) > 4 else 0)


def test_the_group_has_eleven():
    assert len(GROUPS["ruler"]) == 11
