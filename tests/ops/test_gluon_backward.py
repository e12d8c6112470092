"""Gluon gradients: on a Hopper GPU; elsewhere when they are chosen, and that they compile."""

import os
import re
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attention import rules
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia import training as gluon_training
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.attention.rules import Rule
from saccade.ops.gpu.kernel_args import MaskArgs
from tests.ops.cases import Case, on
from tests.ops.hopper import BOUND, on_the_card

MASKS = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"window": 90},
    "sinks": {"window": 40, "sinks": 5},
}
LENGTHS = [(64, 128), (33, 33), (300, 300), (1, 70), (200, 1000), (513, 700)]


@pytest.fixture
def at_any_size(monkeypatch):
    """Small problems go to the Gluon kernels too; returns the calls of their gradients."""
    from saccade.ops.attention.nvidia.gluon.backward import launch as gluon_backward_launch

    for name in ("wins_forward", "wins_gradients"):
        monkeypatch.setattr(gluon_training, name, lambda _: True)
    ran, backward = [], gluon_backward_launch.backward

    def counted(*arguments):
        ran.append(arguments)
        return backward(*arguments)

    monkeypatch.setattr(gluon_backward_launch, "backward", counted)
    return ran


def gradients(backend, tensors, weights, options):
    """Gradients of a loss that uses the outputs and the lse."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    options = dict(options)
    if "sink_logits" in options:
        leaves.append(options["sink_logits"].detach().clone().requires_grad_())
        options["sink_logits"] = leaves[3]
    out, lse = attention(*leaves[:3], **options, return_lse=True, backend=backend)
    loss = (out.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
    return torch.autograd.grad(loss, leaves)


def check(case, dtype):
    """At most twice the error of an eager run in the same precision, as every backend."""
    q, k, v, options = case.inputs()
    tensors = on("cuda", *(x.to(dtype) for x in (q, k, v)))
    options = on("cuda", options)
    weights = on("cuda", torch.randn_like(q), 0.1 * torch.randn(q.shape[:3], dtype=q.dtype))
    truth = gradients("reference", [x.double() for x in tensors], weights, options)
    eager = gradients("reference", tensors, weights, options)
    ours = gradients("triton", tensors, weights, options)
    for found, other, true in zip(ours, eager, truth, strict=True):
        allowed = 2 * (other - true).abs().max() + BOUND[dtype] * max(1, true.abs().max())
        assert found.dtype == other.dtype
        assert (found - true).abs().max() <= allowed


class TestOnGPU:
    pytestmark = on_the_card

    @pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1)], ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("dim", gluon_training.GRADIENT_DIMS)
    def test_equals_the_reference(self, at_any_size, dim, mask, lengths, heads):
        check(Case(heads, lengths, mask, "plain", head_dim=dim), torch.bfloat16)
        assert len(at_any_size) == 1

    @pytest.mark.parametrize("splits", [1, 2, 4])
    @pytest.mark.parametrize("dim", gluon_training.GRADIENT_DIMS)
    def test_ctas_that_share_a_gqa_group(self, at_any_size, monkeypatch, dim, splits):
        from saccade.ops.attention.nvidia.gluon.backward import launch as gluon_backward_launch

        monkeypatch.setattr(gluon_backward_launch, "gqa_splits_of", lambda *_: splits)
        check(Case((8, 2), (700, 900), {"window": 300}, "plain", head_dim=dim), torch.bfloat16)
        check(Case((16, 4), (2500, 2500), {}, "plain", head_dim=dim), torch.bfloat16)
        assert len(at_any_size) == 2

    def test_keys_visible_to_no_query_get_no_gradient(self, at_any_size):
        q, k, v = (torch.randn(1, 2, n, 128, device="cuda").bfloat16() for n in (100, 900, 900))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, window=50, backend="triton")
        _dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
        assert len(at_any_size) == 1
        assert not dk[:, :, :700].any() and not dv[:, :, :700].any()
        assert dv[:, :, 800:].any()

    def test_sink_logits_in_float16(self, at_any_size):
        check(Case((5, 1), (300, 400), {}, "sink_logits", head_dim=128), torch.float16)
        assert len(at_any_size) == 1

    def test_strided_tensors(self, at_any_size):
        """Token-major rows, and an output gradient that is an expanded scalar."""
        base = torch.randn(2, 300, 6, 128, device="cuda").bfloat16().requires_grad_()
        wide = base.detach().double().requires_grad_()
        for x, backend in ((base, "triton"), (wide, "reference")):
            q, k, v = (x.transpose(1, 2)[:, part] for part in (slice(0, 4), [4], [5]))
            attention(q, k, v, backend=backend).sum().backward()
        assert len(at_any_size) == 1
        assert (base.grad - wide.grad).abs().max() < 2e-2 * wide.grad.abs().max()

    def test_deterministic_when_asked(self, at_any_size):
        q, k, v = (
            torch.randn(1, h, 700, 128, device="cuda").bfloat16().requires_grad_()
            for h in (8, 2, 2)
        )
        dout = torch.randn_like(q)
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (
                torch.autograd.grad(attention(q, k, v, backend="triton"), (q, k, v), dout)
                for _ in range(2)
            )
        finally:
            torch.use_deterministic_algorithms(False)
        assert not at_any_size
        assert all(map(torch.equal, first, second))

    def test_registered_operator(self, at_any_size):
        from saccade.ops.attention.nvidia.autograd import flatten, operator

        q, k, v = (
            torch.randn(1, h, 200, 128, device="cuda").bfloat16().requires_grad_()
            for h in (2, 1, 1)
        )
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        flat = flatten(dense_problem(make_call(q, DenseKV(k, v), mask=Mask())))
        torch.library.opcheck(operator(), flat, test_utils=tests)

    def test_inside_torch_compile(self, at_any_size):
        q, k, v = (
            torch.randn(1, h, 200, 128, device="cuda").bfloat16().requires_grad_()
            for h in (2, 1, 1)
        )
        expected = torch.autograd.grad(attention(q, k, v, backend="triton").sum(), (q, k, v))
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(q, k, v, backend="triton").sum(), (q, k, v))
        assert len(at_any_size) == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-2)


def problem(dim=128, dtype=torch.bfloat16, offset=0, **options):
    q, k = (torch.empty(1, h, 256, dim, dtype=dtype, device="meta") for h in (4, 1))
    call = make_call(q, DenseKV(k, k), mask=Mask(), **options)
    return dense_problem(call)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"softcap": 9.0}, "with window and sinks, and nothing else"),
        ({"dim": 256}, "head_dim 256 is not one of 64, 128"),
        ({"dtype": torch.float32}, "float32 is not one of"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
    ids=["softcap", "dim", "dtype", "scale"],
)
def test_refuses_in_a_sentence(monkeypatch, wrong, reason):
    assert "not on an NVIDIA GPU" in gluon_training.gradient_refusal(problem())
    monkeypatch.setattr(gluon_training, "gluon_refusal", lambda device: None)
    assert gluon_training.gradient_refusal(problem()) is None
    assert reason in gluon_training.gradient_refusal(problem(**wrong))


def test_autograd_calls_the_launchers(monkeypatch):
    """With launchers that compute by definition: every argument and gradient is in its place.

    As an operator of torch.library, and as eager runs have it.
    """
    from saccade.ops.attention.nvidia import autograd as triton_autograd
    from saccade.ops.attention.nvidia.gluon.backward import launch as gluon_backward_launch
    from saccade.ops.attention.nvidia.gluon.prefill import launch as gluon_launch

    q, k, v = (torch.randn(2, h, n, 128).bfloat16() for h, n in ((4, 30), (2, 50), (2, 50)))
    sink, weights = torch.randn(4), (torch.randn(2, 4, 30, 128), torch.randn(2, 4, 30))

    def loss(result):
        return (result.out.float() * weights[0]).sum() + (result.lse * weights[1]).sum()

    def by_definition(problem):
        tensors = problem.q, problem.k, problem.v
        return attention(*tensors, sink_logits=problem.sink_logits, return_lse=True,
                         backend="reference")  # fmt: skip

    def gradients_by_definition(problem, out, lse, dout, dlse):
        q, dout = problem.q.double(), dout.double()
        k, v = (x.double().repeat_interleave(2, dim=1) for x in (problem.k, problem.v))
        seen = torch.ones(30, 50, dtype=torch.bool).tril(20)
        p = (q @ k.mT * problem.scale - lse[..., None]).exp() * seen
        delta = (out.double() * dout).sum(-1) - dlse
        ds = p * (dout @ v.mT - delta[..., None]) * problem.scale
        dk, dv = (x.unflatten(1, (2, 2)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
        return *(x.bfloat16() for x in (ds @ k, dk, dv)), delta.float()

    monkeypatch.setattr(gluon_training, "gluon_refusal", lambda _: None)
    for name in ("wins_forward", "wins_gradients"):
        monkeypatch.setattr(gluon_training, name, lambda _: True)
    monkeypatch.setattr(gluon_launch, "forward", by_definition)
    monkeypatch.setattr(gluon_backward_launch, "backward", gradients_by_definition)
    found = []
    for how in ("operator", "eager", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
        call = {"mask": Mask(), "sink_logits": leaves[3]}
        if how != "reference":
            monkeypatch.setattr(triton_autograd, "is_watched", lambda _, how=how: how == "operator")
            problem = dense_problem(make_call(leaves[0], DenseKV(*leaves[1:3]), **call))
            result = triton_autograd.attend(problem)
        else:
            result = attention(*leaves[:3], sink_logits=leaves[3], return_lse=True,
                               backend="reference")  # fmt: skip
        found.append(torch.autograd.grad(loss(result), leaves))
    for ours, theirs, truth in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - truth).abs().max() <= 2e-2 * truth.abs().max()


def test_operators_are_used_where_a_mode_watches():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from saccade.ops.attention.nvidia.autograd import is_watched

    x = torch.empty(2)
    assert not is_watched((x, torch.nn.Parameter(x), None, 3))
    with FlopCounterMode(display=False):
        assert is_watched((x,))
    with FakeTensorMode():
        fake = torch.empty(2)
    assert is_watched((fake,))


def test_refuses_where_determinism_is_asked_for(monkeypatch):
    monkeypatch.setattr(gluon_training, "gluon_refusal", lambda device: None)
    torch.use_deterministic_algorithms(True)
    try:
        assert "no fixed order" in gluon_training.gradient_refusal(problem())
    finally:
        torch.use_deterministic_algorithms(False)


def test_they_run_where_a_rule_prefers_them(monkeypatch):
    rule = Rule(order=("triton",), kernel="gluon", training=True, min_keys=256, min_rows=1024,
                why="", source="")  # fmt: skip
    monkeypatch.setattr(rules, "rules_for", lambda device: (rule,))
    assert gluon_training.wins_gradients(problem())
    assert not gluon_training.wins_forward(problem())
    monkeypatch.setattr(rules, "rules_for", lambda device: (replace(rule, min_keys=257),))
    assert not gluon_training.wins_gradients(problem())
    monkeypatch.setattr(rules, "rules_for", lambda device: (replace(rule, kernel=""),))
    assert not gluon_training.wins_gradients(problem())


@pytest.mark.parametrize(
    ("dim", "mask_args", "causal"),
    [
        (128, MaskArgs(), True),
        (128, MaskArgs(), False),
        (128, MaskArgs(window=1024, sinks=4), True),
        (64, MaskArgs(), True),
        (64, MaskArgs(window=1024, sinks=4), True),
    ],
)
def test_products_are_not_serialised(tmp_path, dim, mask_args, causal):
    """ptxas reports it, and serialises the products when they are issued in another order.

    At D 128 it spills a few registers, never an accumulator; at D 64 none.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tests.ops.compiled import compile_gluon_backward

    found = compile_gluon_backward(dim, mask_args, causal=causal)
    assert found.metadata.shared <= 227 * 1024
    ptx = found.asm["ptx"]
    assert "setmaxnreg" in ptx and "red.relaxed.gpu.global.add.v4.f32" in ptx
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stderr
    spilled = int(re.findall(r"(\d+) bytes spill stores", done.stderr)[0])
    assert spilled <= {64: 0, 128: 128}[dim]
