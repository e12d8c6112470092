"""`saccade::attention`: gradients, opcheck and torch.compile, the same for every backend."""

from types import SimpleNamespace

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attention import dispatch, operator
from saccade.ops.attention.api import make_call
from saccade.ops.attention.cpu.binding import BUILT

needs_kernels = pytest.mark.skipif(not BUILT, reason="built without the C++ kernels")
SHAPES = ((2, 4, 30, 16), (2, 2, 50, 16), (2, 2, 50, 16))


def inputs(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def options_of(name):
    """Options of `attention` that reach the operator as another argument each."""
    return {
        "causal": {},
        "window": {"window": 9, "sinks": 2},
        "all": {"causal": False, "scale": 0.5},
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": torch.rand(4)},
        "sinks": {"sink_logits": torch.randn(4)},
        "padding": {"key_padding": torch.rand(2, 50) > 0.3},
        "kv_lens": {"kv_lens": torch.tensor([31, 50])},
    }[name]


NAMES = ["causal", "window", "all", "softcap", "alibi", "sinks", "padding", "kv_lens"]


def call_of(tensors, name):
    q, k, v = tensors
    options = options_of(name)
    mask = Mask(**{n: options.pop(n) for n in ("causal", "window", "sinks") if n in options})
    return make_call(q, DenseKV(k, v), mask=mask, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_call_is_the_call(name):
    call = call_of(inputs(), name)
    again = operator._call_of(operator.flatten(call, "auto"))
    for field in ("mask", "scale", "softcap", "wants_lse", "q_offset"):
        ours, theirs = getattr(again, field), getattr(call, field)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    for field in ("q", "sink_logits", "alibi_slopes", "key_padding", "kv_lens"):
        assert getattr(again, field) is getattr(call, field)


def test_a_block_selection_travels_too():
    blocks = BlockSelection(
        allowed=torch.ones(2, 2, 2, 4, dtype=torch.bool), q_block=16, k_block=16
    )
    q, k, v = inputs()
    call = make_call(q, DenseKV(k, v), mask=Mask(), blocks=blocks)
    assert operator._call_of(operator.flatten(call, "auto")).blocks == blocks


def by_definition():
    """A backend whose kernels are the formulas, over one causal call of SHAPES."""

    def forward(call):
        return attention(call.q, call.kv.k, call.kv.v, sink_logits=call.sink_logits,
                         return_lse=True, backend="reference")  # fmt: skip

    def backward(call, out, lse, dout, dlse):
        q, dout = call.q.double(), dout.double()
        k, v = (x.double().repeat_interleave(2, dim=1) for x in (call.kv.k, call.kv.v))
        visible = torch.ones(30, 50, dtype=torch.bool).tril(20)
        p = (q @ k.mT * call.scale - lse[..., None]).exp() * visible
        delta = (out.double() * dout).sum(-1) - dlse
        ds = p * (dout @ v.mT - delta[..., None]) * call.scale
        dk, dv = (x.unflatten(1, (2, 2)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
        return *(x.to(call.q.dtype) for x in (ds @ k, dk, dv)), delta.float()

    return SimpleNamespace(
        refusal=lambda call: None, run=forward, forward=forward, backward=backward
    )


@pytest.mark.parametrize("how", ["operator", "eager"])
def test_every_argument_and_gradient_is_in_its_place(monkeypatch, how):
    """As an operator and as a plain autograd.Function; lse and sink_logits have gradients."""
    monkeypatch.setitem(dispatch.BACKENDS, "gluon", by_definition())
    monkeypatch.setattr(operator, "is_watched", lambda flat: how == "operator")
    q, k, v = inputs(torch.float64)
    sink, weights = torch.randn(4).double(), (torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30))
    found = []
    for backend in ("gluon", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
        out, lse = attention(*leaves[:3], sink_logits=leaves[3], return_lse=True, backend=backend)
        loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_who_needs_to_see_an_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(2)
    assert not operator.is_watched((x, torch.nn.Parameter(x), None, 3))
    with FlopCounterMode(display=False):
        assert operator.is_watched((x,))
    with FakeTensorMode():
        fake = torch.empty(2)
    assert operator.is_watched((fake,))


@needs_kernels
@pytest.mark.parametrize("name", ["causal", "window", "softcap", "sinks"])
def test_opcheck(name):
    """torch.library's own checks: schema, fake tensors, autograd registration, AOT dispatch."""
    call = call_of([x.requires_grad_() for x in inputs()], name)
    torch.library.opcheck(operator.attention, operator.flatten(call, "cpu"))


@needs_kernels
@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks(grad, backend):
    q, k, v = inputs()
    q.requires_grad_(grad)

    def f(q, k, v):
        return attention(q * 2, k, v, window=40, sinks=2, backend=backend).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))
    if grad:
        (ours,) = torch.autograd.grad(compiled(q, k, v).sum(), q)
        (truth,) = torch.autograd.grad(f(q, k, v).sum(), q)
        assert torch.allclose(ours, truth, atol=1e-6)
