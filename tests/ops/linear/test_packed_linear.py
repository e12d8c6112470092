"""Products with packed weights against the same matrix in float64."""

from collections.abc import Iterator

import pytest
import torch

from saccade.ops.attention.cpu.binding import extension
from saccade.ops.linear import dequantize, forward, gated, linear, linears, native, rows
from tests.ops.linear.weights import FORMS, random_weight

KERNELS = extension()
TARGETS = [] if KERNELS is None else list(KERNELS.targets())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2**-16, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[*TARGETS, "torch"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of kernels that this machine can run, and PyTorch without them."""
    if request.param == "torch":
        monkeypatch.setattr("saccade.ops.linear.native.BUILT", False)
    else:
        for module in ("native", "forward"):
            monkeypatch.setattr(f"saccade.ops.linear.{module}.target", lambda: request.param)
    _forget_target()
    yield request.param
    _forget_target()


def _forget_target() -> None:
    forward.product_dtype.cache_clear()
    forward.multiplies_bfloat16.cache_clear()


def check_product(out: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias=None) -> None:
    """Few rows: x is taken up to 2^-17.  Many rows: x, weight and sum may be bfloat16."""
    wide = x.double().reshape(-1, x.shape[-1])
    expected = wide @ exact.T + (0 if bias is None else bias.double())
    # Rounding errors of the terms add up like a random walk; six times that never happens.
    walk = (wide.square() @ exact.square().T).sqrt()
    few = len(wide) <= forward.FEW_ROWS and native.BUILT
    share = 2**-15 if few else 2**-7
    if x.dtype == torch.float16 and not few:
        share = max(share, EPSILON[x.dtype] * 2)
    rounding = EPSILON[x.dtype] if few else max(EPSILON[x.dtype], 2**-8)
    error = (out.double().reshape(expected.shape) - expected).abs()
    assert (error <= 6 * share * walk + rounding * expected.abs() * 1.01 + 1e-6).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("out", "width"), [(48, 96), (37, 32), (1, 64), (16, 160)])
def test_weights_give_their_numbers_back(target: str, form, out: int, width: int):
    weight, exact = random_weight(out, width, form)
    for dtype in DTYPES:
        found = dequantize(weight, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=EPSILON[dtype], atol=2e-5)
        index = torch.tensor([[out - 1, 0], [out // 2, 0]])
        assert torch.equal(rows(weight, index, dtype), found[index])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_match_float64(target: str, form, dtype: torch.dtype):
    torch.manual_seed(0)
    for out, width, n in [(48, 96, 1), (37, 160, 7), (5, 32, 13), (70, 64, 45), (37, 32, 33)]:
        weight, exact = random_weight(out, width, form)
        x = torch.randn(n, width).to(dtype)
        bias = torch.randn(out).to(dtype)
        check_product(linear(x, weight), x, exact)
        check_product(linear(x, weight, bias), x, exact, bias)


def test_bfloat16_inputs_are_exact_but_for_the_sums(target: str):
    """Powers of two in a float32 x are kept whatever their size, as bfloat16 keeps them."""
    weight, exact = random_weight(32, 64, (4, 32, True))
    x = torch.zeros(1, 64)
    x[0, 3], x[0, 40] = 2.0**20, 2.0**-10
    out = linear(x, weight)[0].double()
    torch.testing.assert_close(out, exact[:, 3] * 2**20, rtol=1e-5, atol=1)
    x[0, 3] = 0
    out = linear(x, weight)[0].double()
    torch.testing.assert_close(out, exact[:, 40] * 2**-10, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_several_weights_share_their_input(target: str, n: int):
    x = torch.randn(n, 64)
    pairs = [
        random_weight(out, 64, form, out) for out, form in zip((48, 5, 17), FORMS, strict=False)
    ]
    bias = torch.randn(5)
    outs = linears(x, [weight for weight, _ in pairs], [None, bias, None])
    for out, (_, exact), added in zip(outs, pairs, [None, bias, None], strict=True):
        check_product(out, x, exact, added)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_gated_products_match_their_formula(target: str, activation: str, n: int):
    (gate, exact_gate), (up, exact_up) = (random_weight(37, 64, FORMS[1], s) for s in (1, 2))
    x = torch.randn(n, 64) / 20
    first, second = x.double() @ exact_gate.T, x.double() @ exact_up.T
    if activation == "silu":
        expected = first / (1 + (-first).exp()) * second
    else:
        expected = first * 0.5 * (1 + (0.7978845608028654 * (first + 0.044715 * first**3)).tanh())
        expected = expected * second
    close = {"rtol": 2e-4, "atol": 2e-3} if n <= forward.FEW_ROWS else {"rtol": 0.05, "atol": 0.8}
    torch.testing.assert_close(gated(x, gate, up, activation).double(), expected, **close)


def test_any_leading_shape_and_stride(target: str):
    weight, exact = random_weight(20, 64, FORMS[0])
    x = torch.randn(3, 2, 2, 64)
    assert linear(x, weight).shape == (3, 2, 2, 20)
    check_product(linear(x, weight), x, exact)
    turned = torch.randn(64, 5).T
    check_product(linear(turned, weight), turned, exact)
    every_other = torch.randn(6, 128)[::2, ::2]
    check_product(linear(every_other, weight), every_other, exact)
    part = torch.randn(4, 100)[:, 3:67]
    check_product(linear(part, weight), part, exact)
    assert linear(x[0, 0, 0], weight).shape == (20,)
    assert linear(x[:0], weight).shape == (0, 2, 2, 20)
    assert rows(weight, torch.zeros(0, 3, dtype=torch.long), torch.float32).shape == (0, 3, 64)


def test_a_value_that_is_not_a_number_stays_in_its_row(target: str):
    weight, exact = random_weight(20, 64, FORMS[1])
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    out = linear(x, weight)
    assert out[1].isnan().all()
    check_product(out[::2], x[::2], exact)


@pytest.mark.skipif(not TARGETS, reason="needs the C++ kernels")
def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saccade.ops.linear.native.target", lambda: "worst")
    with pytest.raises(ValueError, match='no SIMD target "worst"'):
        linear(torch.ones(1, 32), random_weight(4, 32, FORMS[0])[0])
