"""Packed weights under autograd, torch.compile, plans and other devices, and what is refused."""

import pytest
import torch
from torch import Tensor

from saccade.ops.attention.cpu.binding import extension, record
from saccade.ops.linear import PackedWeight, dequantize, gated, linear, linears, native, rows
from saccade.ops.planning import without_memory
from tests.ops.linear.weights import FORMS, random_weight

native_only = pytest.mark.skipif(extension() is None, reason="needs the C++ kernels")


@pytest.mark.parametrize("n", [2, 40])
def test_gradients_of_x_and_bias(n: int):
    weight, exact = random_weight(37, 64, FORMS[1])
    x, bias = torch.randn(n, 64, requires_grad=True), torch.randn(37, requires_grad=True)
    grad = torch.randn(n, 37)
    linear(x, weight, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() @ exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_gradients_pass_a_gate():
    (gate, exact_gate), (up, exact_up) = (random_weight(16, 32, FORMS[0], s) for s in (1, 2))
    x = (torch.randn(3, 32) / 20).requires_grad_()
    gated(x, gate, up, "silu").sum().backward()
    assert x.grad is not None
    wide = x.detach().double().requires_grad_()
    (torch.nn.functional.silu(wide @ exact_gate.T) * (wide @ exact_up.T)).sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-2, atol=1e-2)


@native_only
def test_the_operators_keep_the_rules_of_torch_library():
    weight, _ = random_weight(20, 64, FORMS[1])
    flat = weight.qdata, weight.scale, weight.minimum, 20, 64, 4, 32
    x = torch.randn(3, 64, requires_grad=True)
    ops = torch.ops.saccade
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.packed_linear, (x, None, *flat), test_utils=checks)
    index = torch.tensor([3, 1])
    torch.library.opcheck(ops.packed_rows, (index, torch.float32, *flat), test_utils=checks)


@native_only
def test_compiled_calls_see_one_operator():
    weight, _ = random_weight(20, 64, FORMS[1])
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: linear(x, weight) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x, weight) * 2)


def test_plans_compute_nothing():
    weight, _ = random_weight(20, 64, FORMS[1])
    with without_memory():
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16)
        out = linear(x, weight)
        embedded = rows(weight, torch.zeros(5, dtype=torch.long), torch.float16)
    assert out.shape == (2, 3, 20) and out.dtype == torch.bfloat16
    assert embedded.shape == (5, 64) and embedded.dtype == torch.float16
    assert linear(torch.empty(2, 64, device="meta"), weight).is_meta
    assert weight.n_bytes == 32 * 64 // 2 + 2 * 32 * 2 * 2


def broken(weight: PackedWeight, **parts: Tensor) -> PackedWeight:
    fields = {"qdata": weight.qdata, "scale": weight.scale, "minimum": weight.minimum, **parts}
    return PackedWeight(weight.shape, weight.bits, weight.group, **fields)


def test_calls_that_fit_nothing_are_refused_in_a_sentence():
    weight, _ = random_weight(20, 64, FORMS[1])
    with pytest.raises(ValueError, match=r"x must be \[.., 64\]"):
        linear(torch.ones(2, 63), weight)
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        linear(torch.ones(2, 64), weight, torch.ones(21))
    with pytest.raises(TypeError, match="float64"):
        linear(torch.ones(2, 64, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="as many biases"):
        linears(torch.ones(2, 64), [weight], [])
    with pytest.raises(ValueError, match="gated needs"):
        gated(torch.ones(2, 64), weight, weight, "relu")
    with pytest.raises(TypeError, match="int8"):
        dequantize(weight, torch.int8)


@native_only
@pytest.mark.parametrize(
    ("part", "shape", "dtype", "message"),
    [
        ("qdata", (1, 8, 64), torch.uint8, "qdata: dimension 0 must be 2"),
        ("qdata", (2, 8, 64), torch.float16, "qdata has the wrong dtype"),
        ("scale", (2, 1, 16), torch.float16, "scale: dimension 1 must be 2"),
        ("minimum", (2, 2, 15), torch.float16, "minimum: dimension 2 must be 16"),
    ],
)
def test_parts_of_a_wrong_size_are_refused(part, shape, dtype, message):
    weight, _ = random_weight(20, 64, FORMS[1])
    wrong = broken(weight, **{part: torch.zeros(shape, dtype=dtype)})
    for call in (
        lambda: linear(torch.ones(1, 64), wrong),
        lambda: dequantize(wrong, torch.float32),
        lambda: rows(wrong, torch.tensor([0]), torch.float32),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@native_only
def test_rows_beyond_the_weight_are_refused():
    weight, _ = random_weight(20, 64, FORMS[1])
    for index in (20, -1):
        with pytest.raises(ValueError, match=f"index {index} is not below the 20 rows"):
            rows(weight, torch.tensor([index]), torch.float32)
    with pytest.raises(ValueError, match="beyond the weight"):
        native.read_rows(weight, None, 10, torch.empty(11, 64))


@native_only
def test_the_binding_refuses_memory_that_is_too_short_or_shared():
    weight, _ = random_weight(20, 64, FORMS[1])
    x, out = torch.ones(2, 64), torch.empty(2, 20)
    with pytest.raises(ValueError, match="out: dimension 1 must be 20"):
        native.products(x, [weight], [None], [torch.empty(2, 19)])
    with pytest.raises(ValueError, match="out overlaps x"):
        native.products(x, [weight], [None], [x.view(-1)[:40].view(2, 20)])
    with pytest.raises(ValueError, match="overlaps itself"):
        native.products(x, [weight], [None], [torch.empty(1, 20).expand(2, 20)])
    with pytest.raises(ValueError, match="scratch: dimension 0 must be 12"):
        native.products(x, [weight], [None], [out], "none", torch.empty(2, 64).bfloat16())
    kernels = extension()
    assert kernels is not None
    address, dtype, shape, strides, _ = record(x)
    short = (address, dtype, shape, strides, 100)
    described = tuple(map(record, weight.parts))
    with pytest.raises(ValueError, match="x needs 512 bytes of storage but has 100"):
        kernels.linear(
            short, ((*described, 20, 64, 32, 4),), (None,), (record(out),), None, 0, 1, ""
        )
