"""Perplexity, divergence and needles, on numbers that can be checked by hand."""

import math

import pytest
import torch

from saccade.core import BadInput
from saccade.evals.needle import hide, make_needles
from saccade.evals.quality import compare, perplexity
from saccade.evals.rows import BASELINE, specs, unchunked_batch
from saccade.evals.text import default_text, read_text


def test_perplexity_of_a_uniform_guess():
    value, error = perplexity(torch.full((10,), math.log(50.0)))
    assert value == pytest.approx(50) and error == pytest.approx(0)


def test_perplexity_error_shrinks_with_the_sample():
    nll = torch.rand(4000)
    few, many = perplexity(nll[:100])[1], perplexity(nll)[1]
    assert few / many == pytest.approx(math.sqrt(40), rel=0.3)


def test_identical_predictions_do_not_diverge():
    logs = torch.randn(30, 11).log_softmax(-1)
    result = compare(logs, logs, torch.randint(0, 11, (30,)))
    assert result.kl == 0 and result.same_top == 1


def test_divergence_is_the_textbook_one():
    exact = torch.tensor([[0.5, 0.5]]).log()
    ours = torch.tensor([[0.9, 0.1]]).log()
    result = compare(ours, exact, torch.tensor([0]))
    assert result.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_needles_are_hidden_whole_and_spread():
    needles = make_needles(3)
    words = list(range(1000, 3000))

    def encode(text):
        return [ord(c) for c in text]

    tokens = hide(words, needles, encode, 900)
    assert len(tokens) == 900
    text = "".join(chr(t) if t < 1000 else "." for t in tokens)
    places = [text.index(needle.sentence) for needle in needles]
    assert places == sorted(places) and places[0] > 50 and places[-1] < 880
    assert [t for t in tokens if t >= 1000] == words[: sum(t >= 1000 for t in tokens)]
    assert all(n.value in n.sentence and n.value not in n.question for n in needles)


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


def test_rows_have_distinct_names_and_a_baseline_first():
    rows = specs(1536, 512, 8192)
    assert rows[0].name == BASELINE
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.options() for row in rows)


def test_the_whole_score_matrix_only_where_it_fits():
    assert unchunked_batch(4096, 512, 9, 20 * 2**30) == 4096
    assert unchunked_batch(65536, 512, 9, 20 * 2**30) == 512
    assert unchunked_batch(4096, 512, 9, None) == 4096
