"""Sampling: its distribution is the textbook's, and a seed repeats."""

import sys

import numpy as np
import pytest
import torch

from saccade.runtime import Sampler

LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, -0.5, 1.5, -3.0, 0.0, 2.5, -1.0])


def expected(logits, temperature, top_k=0, top_p=1.0):
    """Probabilities by NumPy: scale, keep the k largest and their equals, keep the nucleus."""
    scores = logits.double().numpy() / temperature
    if 0 < top_k < len(scores):
        scores = np.where(scores >= np.sort(scores)[-top_k], scores, -np.inf)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 4},  # the third and the fourth are equal
        {"temperature": 1.0, "top_k": 99},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
    ],
)
def test_frequencies_are_the_probabilities(options):
    sampler, draws = Sampler(**options, seed=7), 4000
    counts = np.bincount([sampler.pick(LOGITS) for _ in range(draws)], minlength=len(LOGITS))
    p = expected(LOGITS, **options)
    assert not counts[p == 0].any()
    assert (abs(counts / draws - p) <= 4.5 * np.sqrt(p * (1 - p) / draws)).all()


def test_a_token_is_drawn_where_the_running_sum_passes_a_random_number():
    """Exactly: the same uniform numbers through NumPy give the same tokens."""
    torch.manual_seed(0)
    logits = torch.randn(5000) * 2
    sampler, generator = Sampler(temperature=0.9, seed=11), torch.Generator().manual_seed(11)
    sums = np.cumsum(expected(logits, 0.9))
    for _ in range(200):
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        assert sampler.pick(logits) == np.searchsorted(sums, u, side="right")


class TestTies:
    def test_greedy_takes_one_of_the_largest(self):
        assert Sampler().pick(torch.tensor([0.0, 3.0, 1.0, 3.0])) in (1, 3)

    def test_top_k_keeps_those_equal_to_the_last(self):
        sampler = Sampler(temperature=1.0, top_k=1)
        logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
        assert {sampler.pick(logits) for _ in range(100)} == {1, 3}

    def test_all_equal(self):
        sampler = Sampler(temperature=1.0, top_p=0.5)
        assert 1 < len({sampler.pick(torch.zeros(20)) for _ in range(300)}) <= 11


def test_top_p_keeps_at_least_the_most_likely():
    sampler = Sampler(temperature=1.0, top_p=1e-6)
    assert {sampler.pick(LOGITS) for _ in range(50)} == {8}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision(dtype):
    sampler = Sampler(temperature=1.0, top_k=2)
    assert {sampler.pick(LOGITS.to(dtype)) for _ in range(100)} == {0, 8}


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((50,), -torch.inf)
    logits[[0, 20, 49]] = 0.0
    sampler = Sampler(temperature=1.0)
    assert {sampler.pick(logits) for _ in range(200)} == {0, 20, 49}


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_a_seed_repeats_and_a_state_goes_on(options):
    logits = torch.randn(500)
    a, b, c = (Sampler(temperature=1.0, seed=seed, **options) for seed in (3, 3, 4))
    first = [a.pick(logits) for _ in range(20)]
    assert [b.pick(logits) for _ in range(20)] == first != [c.pick(logits) for _ in range(20)]
    c.restore(a.state())
    assert [c.pick(logits) for _ in range(20)] == [a.pick(logits) for _ in range(20)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_session_goes_on_on_another_device():
    """Random numbers come from the host, so a state means the same on every device."""
    logits = torch.randn(500)
    a, b = (Sampler(temperature=1.0, top_k=50, top_p=0.95, seed=3) for _ in range(2))
    assert [a.pick(logits) for _ in range(50)] == [b.pick(logits.cuda()) for _ in range(50)]
    assert torch.equal(a.state(), b.state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_deterministic_algorithms_can_sample():
    """CUDA's cumsum refuses them, so the host draws."""
    torch.use_deterministic_algorithms(True)
    try:
        assert Sampler(temperature=1.0, top_p=0.5).pick(LOGITS.cuda()) in range(len(LOGITS))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_is_named():
    with pytest.raises(ValueError, match="expected logits that are numbers, got NaN"):
        Sampler(temperature=1.0).pick(torch.full((9,), torch.nan))


def test_without_transformers_it_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.generation", None)
    assert Sampler().pick(LOGITS) == 8
    with pytest.raises(ModuleNotFoundError, match=r'clone of saccade: pip install "\.\[hf\]"'):
        Sampler(temperature=1.0).pick(LOGITS)


def test_options_that_make_no_sense():
    for options in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="temperature >= 0, top_k >= 0 and 0 < top_p <= 1"):
            Sampler(**options)
