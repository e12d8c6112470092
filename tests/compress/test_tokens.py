"""compress_context: the chapter's function, and its bad inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.data())
def test_keeps_the_best_in_order(scores, data):
    target = data.draw(st.integers(1, len(scores)))
    tokens = list(range(100, 100 + len(scores)))
    kept = saccade.compress_context(tokens, scores, target)
    assert len(kept) == target and kept == sorted(kept)
    dropped = [s for t, s in zip(tokens, scores, strict=True) if t not in kept]
    assert min(scores[t - 100] for t in kept) >= max(dropped, default=-9)


def test_ties_keep_the_earlier_token():
    assert saccade.compress_context([7, 8, 9], [1.0, 1.0, 1.0], 2) == [7, 8]


def test_tensors_stay_tensors():
    kept = saccade.compress_context(torch.tensor([5, 6, 7]), torch.tensor([0.1, 9.0, 0.5]), 2)
    assert torch.equal(kept, torch.tensor([6, 7]))


def test_infinite_scores_are_allowed():
    assert saccade.compress_context([1, 2, 3], [float("inf"), 0.0, float("-inf")], 2) == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "scores", "target", "text"),
    [
        ([], [], 1, "at least one token, got an empty text"),
        ([1, 2], [0.0], 1, r"one number per token: expected \[2\], got \[1\]"),
        ([1, 2], [0.0, float("nan")], 1, "must not contain NaN, found one at token 1"),
        ([1, 2], [0.0, 1.0], 3, "between 1 and the 2 tokens of the text, got 3"),
        ([1, 2], [0.0, 1.0], 0, "between 1 and the 2 tokens of the text, got 0"),
    ],
)
def test_errors(tokens, scores, target, text):
    with pytest.raises(ValueError, match=text):
        saccade.compress_context(tokens, scores, target)
