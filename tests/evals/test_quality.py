"""Perplexity, divergence and needles, on numbers that can be checked by hand."""

import math

import pytest
import torch

from saccade.core import BadInput
from saccade.evals.needle import answered, hide, make_needles, needles_for, questions
from saccade.evals.quality import divergence, losses, perplexity, ratio_error
from saccade.evals.text import default_text, read_text


def test_perplexity_of_a_uniform_guess():
    value, error = perplexity(torch.full((10,), math.log(50.0)))
    assert value == pytest.approx(50) and error == pytest.approx(0)


def test_perplexity_error_shrinks_with_the_sample():
    nll = torch.rand(4000)
    few, many = perplexity(nll[:100])[1], perplexity(nll)[1]
    assert few / many == pytest.approx(math.sqrt(40), rel=0.3)


def test_perplexity_beyond_all_floats_is_infinite():
    assert perplexity(torch.tensor([1000.0, 1000.0]))[0] == math.inf


def test_losses_are_those_of_the_targets():
    logs = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert losses(logs, torch.tensor([0, 1])).tolist() == pytest.approx(
        [math.log(4), math.log(2)], rel=1e-6
    )


def test_paired_differences_are_surer_than_two_perplexities():
    """Hard tokens are hard for both, which says nothing about their ratio."""
    nll = torch.rand(500) * 8
    other = nll + 0.1 + 0.01 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    error = ratio_error(other, nll)
    assert error == pytest.approx(math.exp(0.1) * 0.01 / math.sqrt(500), rel=0.2)
    assert error < 0.01 * perplexity(nll)[1] / perplexity(nll)[0]


def test_identical_predictions_do_not_diverge():
    logs = torch.randn(30, 11).log_softmax(-1)
    result = divergence(logs, logs)
    assert result.kl == 0 and result.same_top == 1


def test_divergence_is_the_textbook_one():
    exact = torch.tensor([[0.5, 0.5]]).log()
    ours = torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence(ours, exact).kl == pytest.approx(expected)


def test_tokens_that_are_never_predicted_add_nothing():
    exact = torch.tensor([[0.5, 0.5, 0.0]]).log()
    ours = torch.tensor([[0.9, 0.1, 0.0]]).log()
    assert divergence(ours, exact).kl == pytest.approx(0.5108, abs=1e-4)


def encode(text):
    return [ord(c) for c in text]


def test_needles_are_hidden_whole_and_spread():
    needles = make_needles(3)
    words = list(range(1000, 3000))
    tokens = hide(words, needles, encode, 900)
    assert len(tokens) == 900
    text = "".join(chr(t) if t < 1000 else "." for t in tokens)
    places = [text.index(needle.sentence) for needle in needles]
    assert places == sorted(places) and places[0] > 50 and places[-1] < 880
    assert [t for t in tokens if t >= 1000] == words[: sum(t >= 1000 for t in tokens)]
    assert all(n.value in n.sentence and n.value not in n.question for n in needles)


def test_needles_differ_and_grow_with_the_context():
    assert [needles_for(n) for n in (256, 1024, 3072, 10**6)] == [8, 16, 24, 24]
    needles = make_needles(24)
    assert len({n.question for n in needles}) == len({n.value for n in needles}) == 24


def greedy(asked, wrong):
    """Most likely tokens of a model that knows all answers but a token of question `wrong`."""
    stream = [token for question in asked for token in question.tokens]
    best = torch.tensor([*stream[1:], 0])
    if wrong is not None:
        before = sum(len(question.tokens) for question in asked[:wrong])
        best[before + asked[wrong].answer + 1] += 1  # in the middle of the answer
    return best


@pytest.mark.parametrize("wrong", [None, 0, 2])
def test_an_answer_counts_where_every_token_is_the_likeliest(wrong):
    asked = questions(make_needles(3), encode)
    expected = [index != wrong for index in range(3)]
    assert answered(asked, greedy(asked, wrong)) == expected


def test_what_is_not_the_answer_does_not_count():
    asked = questions(make_needles(2), encode)
    best = greedy(asked, None)
    best[: asked[0].answer - 1] += 1  # the question itself need not be predicted
    assert answered(asked, best) == [True, True]
    for question in asked:
        assert "".join(map(chr, question.tokens[question.answer :])).strip().isdigit()


def test_a_text_too_short():
    with pytest.raises(BadInput, match="the text has 5 tokens, a context of 300 needs at least"):
        hide([1] * 5, make_needles(1), lambda text: [0] * len(text), 300)


def test_default_text_is_long():
    assert len(default_text()) > 400_000


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "is empty"), (b"\xff\xfe\xff", "is not UTF-8 text")]
)
def test_bad_text_files(tmp_path, content, text):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=text):
        read_text(path)
    with pytest.raises(BadInput, match="cannot read the text"):
        read_text(tmp_path / "missing.txt")
