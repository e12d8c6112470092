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


WAYS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 2.0, "top_p": 0.5},
]


@pytest.mark.parametrize("options", WAYS)
class TestLogitsThatAreNoNumbers:
    @pytest.mark.parametrize("where", [0, 4, slice(None)])
    def test_nan_is_refused_wherever_it_is(self, options, where):
        logits = LOGITS.clone()
        logits[where] = torch.nan
        with pytest.raises(ValueError, match="expected logits that are numbers, got NaN"):
            Sampler(**options).pick(logits)

    def test_no_possible_token_is_refused(self, options):
        with pytest.raises(ValueError, match="no token is possible"):
            Sampler(**options).pick(torch.full((9,), -torch.inf))

    def test_an_infinite_logit_is_certain(self, options):
        logits = LOGITS.clone()
        logits[[2, 7]] = torch.inf
        assert {Sampler(**options, seed=seed).pick(logits) for seed in range(20)} <= {2, 7}

    def test_another_shape_is_refused(self, options):
        for wrong in (LOGITS[None], LOGITS[:0], LOGITS[0]):
            with pytest.raises(ValueError, match=r"expected logits \[vocab\]"):
                Sampler(**options).pick(wrong)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-39, 1e-45, 1e-60, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tiny_temperature_takes_the_most_likely(temperature, dtype):
    logits = torch.cat((LOGITS, torch.tensor([-torch.inf]))).to(dtype)
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        assert Sampler(temperature=temperature, **options).pick(logits) == 8


def test_an_infinite_temperature_draws_all_possible_tokens_alike():
    logits = torch.cat((LOGITS, torch.tensor([-torch.inf])))
    sampler = Sampler(temperature=torch.inf)
    counts = np.bincount([sampler.pick(logits) for _ in range(2000)], minlength=11)
    assert counts[10] == 0 and (abs(counts[:10] - 200) < 4.5 * np.sqrt(180)).all()


def test_large_logits_keep_their_differences():
    """Divided by a small temperature they would overflow where their differences do not."""
    logits = torch.tensor([1e30, 1e30, -1e30])
    assert {Sampler(temperature=1e-9, seed=s).pick(logits) for s in range(30)} == {0, 1}


def test_a_vocabulary_beyond_what_float32_counts():
    logits = torch.full((2**24 + 1,), -torch.inf)
    logits[-1] = 0.0
    assert Sampler().pick(logits) == Sampler(temperature=1.0).pick(logits) == 2**24


def test_without_transformers_it_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.generation", None)
    assert Sampler().pick(LOGITS) == 8
    assert Sampler(temperature=1e-9).pick(LOGITS) == 8
    with pytest.raises(ModuleNotFoundError, match=r'clone of saccade: pip install "\.\[hf\]"'):
        Sampler(temperature=1.0, top_k=2).pick(LOGITS)


def test_options_that_make_no_sense():
    nan = float("nan")
    for options in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_p": nan}, {"top_k": -1},
                    {"temperature": -1.0}, {"temperature": nan}):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{next(iter(options))} has to be "):
            Sampler(**options)


def test_seeds_have_64_bits():
    for seed in (-(2**63), -1, 2**63, 2**64 - 1):
        assert Sampler(temperature=1.0, seed=seed).pick(LOGITS) in range(len(LOGITS))
    for seed in (2**64, -(2**63) - 1, 10**400):
        with pytest.raises(ValueError, match="a seed is expected from"):
            Sampler(seed=seed)


def test_options_of_another_type_are_named():
    for options in ({"temperature": "hot"}, {"top_k": 2.5}, {"seed": "1"}, {"top_p": None}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} is expected to be a"):
            Sampler(**options)
    assert Sampler(temperature=1, top_k=np.int64(1)).pick(LOGITS) == 8
