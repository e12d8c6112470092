"""Transformations of the operator: each is right for a backend, or refused in a sentence."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from saccade.core import DenseKV, Mask, Unsupported
from saccade.ops import attend, attention, make_call
from tests.support import views
from tests.support.cases import HERE
from tests.support.random_inputs import normal, qkv
from tests.support.tolerance import largest_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own
BACKENDS = ["auto", *HERE]
INPUTS = (4, 2, 5, 9, 16)


def refused(backend):
    """Only native kernels and PyTorch's own may refuse a transformation."""
    assert backend in ("cpu", "sdpa", "triton")


def numeric(f, x, direction, step=1e-6):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes", "sink_logits"])
def test_forward_mode_gives_the_tangent(backend, name):
    values = dict(zip("qkv", qkv(*INPUTS), strict=True))
    values |= {"alibi_slopes": torch.rand(4), "sink_logits": torch.randn(4)}
    direction = torch.randn_like(values[name])

    def f(x, backend=backend):
        given = {n: y.to(x.dtype) for n, y in values.items()} | {name: x}
        return attention(**given, backend=backend)

    wide = values[name].double()
    exact = numeric(lambda x: f(x, "reference"), wide, direction.double())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values[name], direction)
        try:
            tangent = forward_ad.unpack_dual(f(dual)).tangent
        except Unsupported as error:
            refused(backend)
            assert "no forward-mode gradients" in str(error)
            return
    assert largest_error(tangent, exact) < 1e-4
    ours = torch.func.jvp(f, (values[name],), (direction,))[1]
    assert largest_error(ours, exact) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["alibi_slopes", "sink_logits"])
def test_what_changes_the_scores_gets_a_gradient_alone(backend, name):
    q, k, v = qkv(*INPUTS)

    def gradient(x, backend):
        x = x.clone().requires_grad_()
        tensors = (y.to(x.dtype) for y in (q, k, v))
        out = attention(*tensors, **{name: x}, backend=backend)
        return torch.autograd.grad(out.square().sum(), x)[0]

    x = torch.rand(4)
    try:
        ours = gradient(x, backend)
    except Unsupported:
        refused(backend)
        return
    assert largest_error(ours, gradient(x.double(), "reference")) < 1e-4


@pytest.mark.parametrize("backend", ["auto", "tiled", "cpu"])
def test_recent_keys_and_scales_of_a_quantized_view_get_a_gradient(backend):
    q, k, v = qkv(4, 2, 3, 40, 16)
    view = views.quantized(k, v, 8, group=16)
    view.recent_k.requires_grad_()
    try:
        out = attend(make_call(q, view, mask=Mask()), backend=backend).out
    except Unsupported:
        refused(backend)
        return
    assert torch.autograd.grad(out.sum(), view.recent_k)[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend):
    q, k, v = qkv(*INPUTS)

    def hessian_product(x, backend):
        x = x.clone().requires_grad_()
        out = attention(x, k.to(x.dtype), v.to(x.dtype), backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    try:
        ours = hessian_product(q, backend)
    except Unsupported as error:
        assert 'Use backend="tiled" for second ones.' in str(error)
        return
    assert largest_error(ours, hessian_product(q.double(), "reference")) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_grad(backend):
    q, k, v = qkv(*INPUTS)

    def gradient(x, backend):
        tensors = (k.to(x.dtype), v.to(x.dtype))
        return torch.func.grad(lambda q: attention(q, *tensors, backend=backend).sin().sum())(x)

    try:
        ours = gradient(q, backend)
    except Unsupported as error:
        refused(backend)
        assert "torch.func" in str(error)
        return
    assert largest_error(ours, gradient(q.double(), "reference")) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jit_trace_are_refused(backend):
    q, k, v = qkv(*INPUTS)

    def f(q, k, v):
        return attention(q, k, v, backend=backend)

    with pytest.raises(Unsupported, match="Fold the mapped dimension into the batch"):
        torch.vmap(f, in_dims=(0, None, None))(q[None], k, v)
    with pytest.raises(Unsupported, match=r"Use torch\.compile or torch\.export"):
        torch.jit.trace(f, (q, k, v))


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v):
        return attention(q, k, v, window=4, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_traced_graphs_compute(backend):
    """make_fx and torch.export record an operator, not memory that kernels filled once."""
    q, k, v = qkv(*INPUTS)
    layer = Layer(backend)
    expected = attention(2 * q, k, v, window=4, backend="reference")
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(layer, tracing_mode=mode)(q, k, v)
        assert largest_error(graph(2 * q, k, v), expected) < 1e-5
    for strict in (False, True):
        program = torch.export.export(layer, (q, k, v), strict=strict).module()
        assert largest_error(program(2 * q, k, v), expected) < 1e-5


def test_an_exported_length_is_free():
    q, k, v = qkv(*INPUTS)
    dims = {"q": {2: torch.export.Dim("rows", min=2, max=8)}, "k": None, "v": None}
    program = torch.export.export(Layer("auto"), (q, k, v), dynamic_shapes=dims).module()
    expected = attention(q[:, :, :3], k, v, window=4, backend="reference")
    assert largest_error(program(q[:, :, :3], k, v), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_subclasses(backend):
    """One with storage of its own, and a wrapper of two tensors."""
    q, k, v = qkv(*INPUTS)
    expected = attention(q, k, v, backend="reference")
    named = q.as_subclass(type("Named", (torch.Tensor,), {}))
    assert largest_error(attention(named, k, v, backend=backend), expected) < 1e-5
    pairs = [TwoTensor(x, x) for x in (q, k, v)]
    assert largest_error(attention(*pairs, backend=backend).b, expected) < 1e-5


def test_native_kernels_refuse_other_views_under_a_tracer():
    q, k, v = qkv(4, 2, 2, 16, 16)
    view = views.paged(k, v, 8)
    if "cpu" not in HERE:
        pytest.skip("built without the C++ kernels")
    with pytest.raises(Unsupported, match="cannot see its kernels"):
        make_fx(lambda q: attend(make_call(q, view, mask=Mask()), backend="cpu").out)(q)


def test_only_calls_are_attended():
    x = normal(1, 2, 3, 8)
    with pytest.raises(TypeError, match="must be an AttentionCall"):
        attend(DenseKV(x, x))  # type: ignore[arg-type]


MAPPED = {
    "sink_logits": torch.zeros(3, 4),
    "alibi_slopes": torch.zeros(3, 4),
    "key_padding": torch.ones(3, 1, 9, dtype=torch.bool),
    "kv_lens": torch.full((3, 1), 9),
    "cu_seqlens": torch.tensor([[0, 9]] * 3),
}


@pytest.mark.parametrize("name", MAPPED)
def test_no_argument_can_be_mapped(name):
    q, k, v = (x[:1] for x in qkv(*INPUTS))
    queries = k.repeat_interleave(2, dim=1) if name == "cu_seqlens" else q
    with pytest.raises(Unsupported, match="Fold the mapped dimension into the batch"):
        torch.vmap(lambda x: attention(queries, k, v, **{name: x}))(MAPPED[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_gradients_at_once(backend):
    q, k, v = qkv(*INPUTS)

    def jacobian(x, backend):
        def f(x):
            return attention(x, k.to(x.dtype), v.to(x.dtype), backend=backend).sum((1, 2, 3))

        return torch.autograd.functional.jacobian(f, x, vectorize=True)

    assert largest_error(jacobian(q, backend), jacobian(q.double(), "reference")) < 1e-4


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_forward_over_reverse(backend):
    q, k, v = (x[:1, :, :3, :4] for x in qkv(*INPUTS))

    def hessian(x, backend):
        def f(x):
            return attention(x, k.to(x.dtype), v.to(x.dtype), backend=backend).square().sum()

        return torch.func.hessian(f)(x)

    assert largest_error(hessian(q, backend), hessian(q.double(), "reference")) < 1e-3


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_functionalize_and_linearize(backend):
    q, k, v = qkv(*INPUTS)
    expected = attention(q, k, v, backend="reference")

    def f(x):
        return attention(x, k, v, backend=backend)

    assert largest_error(torch.func.functionalize(f)(q), expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about its graph
        out, push = torch.func.linearize(f, q)
    assert largest_error(out, expected) < 1e-5
    direction = torch.randn_like(q)
    assert largest_error(push(direction), torch.func.jvp(f, (q,), (direction,))[1]) < 1e-5
