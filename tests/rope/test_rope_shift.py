"""Moving rotated keys: rotate(x, p) moved by d is rotate(x, p + d), whatever the magnitude."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.rope import (
    Linear,
    Llama3,
    NTKAware,
    Rule,
    Unscaled,
    YaRN,
    apply,
    inverse_frequencies,
    shift_keys,
    tables,
)

YARN = YaRN(factor=4.0, original_max_position=32768)
RULES: tuple[Rule, ...] = (
    Unscaled(),
    Linear(factor=3.0),
    NTKAware(factor=8.0),
    YARN,
    Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    attention_factor=st.floats(0.25, 4.0),
    start=st.integers(0, 1_000_000),
    delta=st.integers(-1_000_000, 1_000_000),
    pairs=st.integers(2, 16),
    staying=st.integers(0, 3),
    interleaved=st.booleans(),
)
def test_rotations_add(
    *,
    rule: Rule,
    attention_factor: float,
    start: int,
    delta: int,
    pairs: int,
    staying: int,
    interleaved: bool,
) -> None:
    inv_freq, _ = inverse_frequencies(rule, base=1e6, rotary_dim=2 * pairs)
    x, positions = noise(1, 2, 5, 2 * pairs + staying), torch.arange(start, start + 5)

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        tabled = tables(inv_freq, positions, attention_factor, torch.float64)
        return apply(x, *tabled, interleaved=interleaved)

    moved = shift_keys(rotated(positions), inv_freq, delta, interleaved=interleaved)
    torch.testing.assert_close(moved, rotated(positions + delta), rtol=0, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5000, 5000), min_size=6, max_size=6), st.booleans())
def test_each_key_may_move_by_its_own_delta(deltas: list[int], interleaved: bool) -> None:
    """Closing up the holes that eviction leaves."""
    inv_freq, magnitude = inverse_frequencies(YARN, base=1e6, rotary_dim=8)
    x, positions, delta = noise(2, 1, 6, 8), torch.arange(6) * 1000, torch.tensor(deltas)
    before = tables(inv_freq, positions, magnitude, torch.float64)
    after = tables(inv_freq, positions + delta, magnitude, torch.float64)
    k = apply(x, *before, interleaved=interleaved)
    moved = shift_keys(k, inv_freq, delta, interleaved=interleaved)
    expected = apply(x, *after, interleaved=interleaved)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-10)


def test_forms_of_delta_agree() -> None:
    k, inv_freq = noise(2, 3, 4, 8), inverse_frequencies(YARN, base=1e6, rotary_dim=8).inv_freq
    expected = shift_keys(k, inv_freq, -7)
    forms = (torch.tensor(-7), torch.tensor([-7]), torch.full((4,), -7), torch.full((2, 4), -7))
    for delta in (*forms, torch.full((2, 1), -7), torch.full((1, 4), -7, dtype=torch.int32)):
        assert torch.equal(shift_keys(k, inv_freq, delta), expected)


def test_a_row_may_move_by_its_own_delta() -> None:
    k, inv_freq = noise(2, 3, 4, 8), inverse_frequencies(YARN, base=1e6, rotary_dim=8).inv_freq
    moved = shift_keys(k, inv_freq, torch.tensor([[3], [-5]]))
    assert torch.equal(moved[:1], shift_keys(k[:1], inv_freq, 3))
    assert torch.equal(moved[1:], shift_keys(k[1:], inv_freq, -5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_does_not_come_in_again(dtype: torch.dtype) -> None:
    """llama.cpp's shift makes YaRN keys 1.1386 times longer each time, even for a delta of 0."""
    inv_freq, magnitude = inverse_frequencies(YARN, base=1e6, rotary_dim=128)
    k = apply(noise(1, 2, 16, 128).to(dtype), *tables(inv_freq, torch.arange(16), magnitude))
    assert magnitude == pytest.approx(1.138629, abs=1e-6)
    assert torch.equal(shift_keys(k, inv_freq, 0), k)
    moved = k
    for delta in (5, -900, 100_000, -7):
        moved = shift_keys(moved, inv_freq, delta)
    assert moved.dtype == dtype
    lengths = moved.double().norm(dim=-1) / k.double().norm(dim=-1)
    assert (lengths - 1).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    k, inv_freq = (
        noise(1, 2, 9, 64).to(dtype),
        inverse_frequencies(YARN, base=1e6, rotary_dim=64)[0],
    )
    got, exact = shift_keys(k, inv_freq, -700), shift_keys(k.double(), inv_freq, -700)
    allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((got.double() - exact).abs() <= allowed).all()


def test_unrotated_dimensions_are_unchanged() -> None:
    k, inv_freq = noise(1, 2, 4, 12), inverse_frequencies(YARN, base=1e6, rotary_dim=8).inv_freq
    assert torch.equal(shift_keys(k, inv_freq, 11)[..., 8:], k[..., 8:])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 4), (1, 1, 4)])
def test_deltas_that_do_not_fit(shape: tuple[int, ...]) -> None:
    k, inv_freq = noise(2, 3, 4, 8), inverse_frequencies(YARN, base=1e6, rotary_dim=8).inv_freq
    text = r"delta must be .* shape \[4\] or \[2, 4\] .*\[2, 3, 4, 8\].*one delta per key"
    with pytest.raises(ValueError, match=text):
        shift_keys(k, inv_freq, torch.zeros(shape, dtype=torch.long))


def test_fractional_deltas_are_refused() -> None:
    k, inv_freq = noise(2, 3, 4, 8), inverse_frequencies(YARN, base=1e6, rotary_dim=8).inv_freq
    with pytest.raises(ValueError, match="positions must be integers, got float32"):
        shift_keys(k, inv_freq, torch.tensor(0.5))
