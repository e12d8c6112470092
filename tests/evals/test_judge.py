"""What rows are compared with, on predictions made up."""

import math

import pytest
import torch

from saccade.evals.judge import Judge
from saccade.evals.measure import Seen
from saccade.evals.rows import FLASH, SDPA, TEXTBOOK
from saccade.report.comparison import Row

TARGETS = torch.tensor([0, 1, 2, 0])


def logs(*first):
    """Log-probabilities over three tokens, one row for each target; `first` is that of token 0."""
    rows = [[p, (1 - p) * 0.6, (1 - p) * 0.4] for p in first]
    return torch.tensor(rows, dtype=torch.float64).log()


def seen(*first, answers=()):
    found = logs(*first)
    nll = -found.gather(-1, TARGETS[:, None])[:, 0]
    return Seen(log_probs=found, nll=nll, answers=list(answers))


def judged(exact, reference=SDPA, **rows):
    judge = Judge(exact, torch.float32)
    made = {name: Row(name=name, group="g") for name in rows}
    for name, each in rows.items():
        judge.add(made[name], each)
    judge.settle()
    judge.finish(reference)
    return judge, made


EXACT = (0.5, 0.4, 0.3, 0.6)
OTHER = (0.5, 0.4, 0.3, 0.2)


def test_rows_are_compared_with_sdpa_also_those_before_it():
    _, rows = judged(SDPA, **{TEXTBOOK: seen(*EXACT), SDPA: seen(*EXACT), FLASH: seen(*OTHER)})
    p, q = logs(*EXACT), logs(*OTHER)
    assert rows[TEXTBOOK].kl == rows[SDPA].kl == 0
    assert rows[FLASH].kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert rows[FLASH].same_top == 0.75
    assert rows[SDPA].perplexity == pytest.approx(
        math.exp(-(math.log(0.5) + math.log(0.36) + math.log(0.28) + math.log(0.6)) / 4)
    )


def test_the_error_of_a_ratio_is_that_of_paired_differences():
    _, rows = judged(SDPA, **{SDPA: seen(*EXACT), FLASH: seen(*OTHER)})
    gap = math.log(0.6) - math.log(0.2)  # at one of four tokens
    deviation = math.sqrt((3 * (gap / 4) ** 2 + (3 * gap / 4) ** 2) / 3)
    expected = math.exp(gap / 4) * deviation / 2
    assert rows[FLASH].perplexity_ratio_se == pytest.approx(expected)
    assert rows[SDPA].perplexity_ratio_se is None


def test_needles_count_where_the_exact_row_finds_them():
    exact = seen(*EXACT, answers=[True, False, True, True])
    other = seen(*EXACT, answers=[True, True, False, True])
    _, rows = judged(SDPA, **{SDPA: exact, FLASH: other})
    assert (rows[SDPA].needle, rows[SDPA].needle_trials) == (1.0, 3)
    assert (rows[FLASH].needle, rows[FLASH].needle_trials) == (pytest.approx(2 / 3), 3)


def test_an_exact_row_that_finds_none_leaves_needles_unmeasured():
    none = seen(*EXACT, answers=[False, False])
    _, rows = judged(SDPA, **{SDPA: none})
    assert rows[SDPA].needle is None and rows[SDPA].needle_trials == 0


def test_sdpa_that_computes_something_else_is_not_the_measure():
    """As with soft caps, which it leaves out."""
    judge, rows = judged(SDPA, TEXTBOOK, **{TEXTBOOK: seen(*EXACT), SDPA: seen(*OTHER)})
    assert judge.exact == TEXTBOOK
    assert rows[TEXTBOOK].kl == 0 and rows[SDPA].kl > 0.05
    assert "differs from the model's own attention" in rows[SDPA].note


def test_without_the_exact_row_the_first_one_stands_for_it():
    judge, rows = judged(SDPA, FLASH, **{FLASH: seen(*EXACT), "int8 KV": seen(*OTHER)})
    assert judge.exact == FLASH
    assert rows[FLASH].kl == 0 and rows["int8 KV"].kl > 0
    assert rows["int8 KV"].perplexity_ratio_se is not None
