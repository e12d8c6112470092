"""Tables are right far out, and a rotation is a rotation: against mpmath and complex numbers."""

from __future__ import annotations

import mpmath
import pytest
import torch

from saccade.rope import Linear, Unscaled, apply, inverse_frequencies, tables

FAR = 1_000_000


def plain(rotary_dim: int, base: float = 1e6) -> torch.Tensor:
    return inverse_frequencies(Unscaled(), base=base, rotary_dim=rotary_dim).inv_freq


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def exact_angles(position: int, base: float, rotary_dim: int) -> list[mpmath.mpf]:
    mpmath.mp.dps = 50
    exponents = [mpmath.mpf(-2 * i) / rotary_dim for i in range(rotary_dim // 2)]
    return [position * mpmath.mpf(base) ** exponent for exponent in exponents]


def test_tables_are_right_at_a_million() -> None:
    cos, sin = tables(plain(128), torch.tensor([FAR]), dtype=torch.float64)
    angles = exact_angles(FAR, 1e6, 128)
    expected_cos = torch.tensor([float(mpmath.cos(a)) for a in angles], dtype=torch.float64)
    expected_sin = torch.tensor([float(mpmath.sin(a)) for a in angles], dtype=torch.float64)
    torch.testing.assert_close(cos[0], expected_cos, rtol=0, atol=1e-9)
    torch.testing.assert_close(sin[0], expected_sin, rtol=0, atol=1e-9)
    rounded = tables(plain(128), torch.tensor([FAR])).cos[0]
    torch.testing.assert_close(rounded.double(), expected_cos, rtol=0, atol=1e-6)


def test_float32_angles_are_wrong_at_a_million() -> None:
    """The reason for float64: what everyone else computes is off by 0.06 rad there."""
    half = 1.0 / (1e6 ** (torch.arange(0, 128, 2).float() / 128))
    error = (half * FAR).double() - FAR * plain(128)
    assert 0.05 < error.abs().max() < 0.07


def test_float32_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float64 .* got float32 \[64\].*inverse_frequencies"):
        tables(plain(128).float(), torch.arange(4))


def test_float_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"positions must be integers, got float32.*\.long\(\)"):
        tables(plain(128), torch.arange(4.0))


def test_tables_carry_the_magnitude_and_the_dtype() -> None:
    cos, sin = tables(plain(8), torch.arange(6).reshape(2, 3), 1.5, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 3, 4)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert torch.equal(cos[0, 0], torch.full((4,), 1.5, dtype=torch.bfloat16))


def test_a_position_per_row_and_one_for_all_agree() -> None:
    x = noise(3, 2, 5, 16)
    shared = tables(plain(16), torch.arange(5), dtype=torch.float64)
    rows = tables(plain(16), torch.arange(5).expand(3, 5), dtype=torch.float64)
    one_row = tables(plain(16), torch.arange(5)[None], dtype=torch.float64)
    assert torch.equal(apply(x, *rows), apply(x, *shared))
    assert torch.equal(apply(x, *one_row), apply(x, *shared))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (64, 64), (80, 32), (6, 4)])
def test_rotation_is_multiplication_by_a_unit(
    head_dim: int, rotary_dim: int, interleaved: bool
) -> None:
    """Pairs as complex numbers times exp(i angle): the same rotation computed another way."""
    x, positions = noise(2, 3, 7, head_dim), torch.arange(100, 107)
    inv_freq = plain(rotary_dim)
    first, unrotated = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = first.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imag = pairs.unbind(-1 if interleaved else -2)
    angles = positions[:, None] * inv_freq
    rotated = torch.complex(real, imag) * torch.polar(torch.ones_like(angles), angles)
    halves = torch.stack((rotated.real, rotated.imag), dim=-1 if interleaved else -2)
    expected = torch.cat((halves.flatten(-2), unrotated), dim=-1)
    tabled = tables(inv_freq, positions, dtype=torch.float64)
    got = apply(x, *tabled, interleaved=interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distance_alone() -> None:
    q, k = noise(1, 1, 1, 32), noise(1, 1, 1, 32).flip(-1)
    inv_freq, _ = inverse_frequencies(Linear(factor=2.0), base=1e4, rotary_dim=32)

    def score(q_pos: int, k_pos: int) -> float:
        rotated = [
            apply(x, *tables(inv_freq, torch.tensor([p]), dtype=torch.float64))
            for x, p in ((q, q_pos), (k, k_pos))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(17, 5) == pytest.approx(score(100_017, 100_005), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = noise(1, 2, 9, 64).to(dtype)
    positions = torch.arange(9) * 1000
    got = apply(x, *tables(plain(64), positions))
    exact = apply(x.double(), *tables(plain(64), positions, dtype=torch.float64))
    assert got.dtype == dtype
    # half a unit in the last place, and a little for float32 sums that fall next to a tie
    allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    tabled = tables(plain(4), torch.arange(3), dtype=torch.float64)
    x = noise(1, 2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: apply(t, *tabled, interleaved=interleaved), x)


def test_strided_heads_need_no_copy_first() -> None:
    """A [B, L, H, D] projection, transposed, as every model passes it."""
    x = noise(2, 7, 3, 16).transpose(1, 2)
    tabled = tables(plain(16), torch.arange(7), dtype=torch.float64)
    assert torch.equal(apply(x, *tabled), apply(x.contiguous(), *tabled))


@pytest.mark.parametrize(
    ("x_shape", "cos_shape", "text"),
    [
        ((7, 16), (7, 8), r"x must be .*\[batch, heads, length, head_dim\], got float32 \[7, 16\]"),
        ((1, 2, 7, 16), (6, 8), r"must have shape \[7, R/2\] or \[1, 7, R/2\] .* got \[6, 8\]"),
        ((1, 2, 7, 16), (1, 8), r"must have shape \[7, R/2\] .* got \[1, 8\]"),
        ((2, 2, 7, 16), (3, 7, 8), r"or \[2, 7, R/2\] .* got \[3, 7, 8\]"),
        ((1, 2, 7, 16), (7, 16), r"rotate 32 dimensions, but x has head_dim 16.*per pair"),
    ],
)
def test_shapes_that_do_not_fit(
    x_shape: tuple[int, ...], cos_shape: tuple[int, ...], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        apply(torch.zeros(x_shape), torch.zeros(cos_shape), torch.zeros(cos_shape))


def test_tables_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \[7, 8\] and \[7, 4\]"):
        apply(torch.zeros(1, 2, 7, 16), torch.zeros(7, 8), torch.zeros(7, 4))


def test_quantized_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got int8 .*Rotate before quantizing"):
        apply(torch.zeros(1, 2, 7, 16, dtype=torch.int8), torch.zeros(7, 8), torch.zeros(7, 8))
