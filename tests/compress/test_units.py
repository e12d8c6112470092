"""Units: the best that fit, protected ones always, in order; where sentences begin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade
from saccade.compress import keep_units, sentence_starts
from saccade.core import BadInput

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40)


@given(SCORES, st.data())
def test_units_of_one_token_are_those_of_compress_context(scores, data):
    target = data.draw(st.integers(1, len(scores)))
    kept = keep_units(torch.tensor(scores), range(len(scores)), target)
    assert kept.tolist() == saccade.compress_context(range(len(scores)), scores, target)


@given(SCORES, st.data())
def test_whole_units_by_their_mean_within_the_target(scores, data):
    n = len(scores)
    starts = sorted({0, *data.draw(st.lists(st.integers(0, n - 1), max_size=8))})
    spans = [range(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]
    marked = data.draw(st.sets(st.integers(0, n - 1), max_size=2))
    protected = torch.tensor([i in marked for i in range(n)])
    forced = [span for span in spans if marked & set(span)]
    least = sum(map(len, forced)) or min(map(len, spans))
    target = data.draw(st.integers(least, n))
    kept = keep_units(torch.tensor(scores), starts, target, protected=protected).tolist()
    assert kept == sorted(kept) and 1 <= len(kept) <= target and marked <= set(kept)
    taken = [span for span in spans if set(span) <= set(kept)]
    assert sum(map(len, taken)) == len(kept)  # no unit in part

    def mean(span):
        return math.fsum(torch.tensor(scores).double()[list(span)].tolist()) / len(span)

    for span in spans:  # what was left out is worse than all that was chosen, or did not fit
        if span not in taken:
            better = [each for each in taken if each not in forced and mean(each) >= mean(span)]
            room = target - sum(map(len, forced)) - sum(map(len, better))
            worse = [e for e in taken if e not in forced and mean(e) < mean(span) - 1e-12]
            assert not worse or len(span) > room


def test_unknown_scores_do_not_count_in_a_mean():
    scores = torch.tensor([math.inf, 0.0, 5.0, 1.0])
    assert keep_units(scores, [0, 2], 2).tolist() == [2, 3]
    assert keep_units(scores, [0, 1], 1).tolist() == [0]


@pytest.mark.parametrize(
    ("starts", "target", "protected", "said"),
    [
        ([0, 2], 1, None, "no unit fits into 1 tokens, the shortest has 2"),
        ([0, 2], 3, [True, False, False, True], "has 4 tokens .* more than the 3 to keep"),
    ],
)
def test_what_cannot_be_kept(starts, target, protected, said):
    marked = None if protected is None else torch.tensor(protected)
    with pytest.raises(BadInput, match=said):
        keep_units(torch.zeros(4), starts, target, protected=marked)


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. ", "Two! ", "“Three?” ", "4.5 is a number, e.g. this. ", "End"],
        ["a line\n", "- an item\n", "Wrapped\nhere. ", "Then"],
        ["no full stop\n\n", "small letter. ", "Next"],
        ["一つ。", "二つ！", "三"],
        ["only one"],
    ],
)
def test_sentences(sentences):
    text = "".join(sentences)
    starts = sentence_starts(text)
    cut = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert cut == sentences
