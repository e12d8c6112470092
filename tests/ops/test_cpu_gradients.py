"""Gradients of the C++ kernels."""

import pytest
import torch

from saccade.core import Unsupported
from saccade.ops import attention
from saccade.ops.attention.cpu import binding
from tests.support.random_inputs import normal, qkv
from tests.support.tolerance import assert_as_exact

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")
TARGETS = [] if _cpu is None else _cpu.targets()


def packed(q_len, kv_len):
    q_bounds = torch.tensor([0, q_len // 3, q_len // 3, q_len])
    return {"cu_seqlens": (q_bounds, torch.tensor([0, kv_len // 2, kv_len // 2 + 1, kv_len]))}


OPTIONS = {
    "causal": lambda *_: {},
    "full": lambda *_: {"causal": False},
    "window": lambda *_: {"window": 50},
    "sinks": lambda *_: {"window": 33, "sinks": 5},
    "softcap": lambda *_: {"softcap": 2.0},
    "alibi": lambda b, h, *_: {"alibi_slopes": torch.rand(h)},
    "sink_logits": lambda b, h, *_: {"sink_logits": torch.randn(h)},
    "lengths": lambda b, h, q, k: {"kv_lens": torch.randint(1, k + 1, (b,))},
    "padding": lambda b, h, q, k: {"key_padding": torch.rand(b, k) > 0.3},
    "packed": lambda b, h, q, k: packed(q, k),
}
SHAPES = [  # batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim
    (1, 4, 2, 130, 130, 64, 64),
    (1, 6, 2, 77, 200, 80, 40),
    (1, 3, 1, 5, 3, 24, 24),
    (1, 8, 8, 300, 300, 128, 128),
]


def gradients(backend, dtype, tensors, weights, options):
    """Gradients of a weighted sum of out and lse by q, k, v (and sink_logits)."""
    inputs = [x.detach().to(dtype).clone().requires_grad_() for x in tensors]
    options = dict(options)
    if "sink_logits" in options:
        sink_type = torch.promote_types(dtype, torch.float32)
        options["sink_logits"] = options["sink_logits"].detach().to(sink_type).requires_grad_()
    out, lse = attention(*inputs, **options, return_lse=True, backend=backend)
    seen = lse.isfinite()
    loss = (out * weights[0].to(dtype)).sum() + (lse[seen] * weights[1][seen]).sum()
    loss.backward()
    extra = [options["sink_logits"].grad] if "sink_logits" in options else []
    return [x.double() for x in (*(i.grad for i in inputs), *extra)]


def problem(shape, name):
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = shape
    tensors = qkv(heads, kv_heads, q_len, kv_len, dim, value_dim=value_dim, batch=batch)
    weights = normal(batch, heads, q_len, value_dim), normal(batch, heads, q_len)
    return tensors, weights, OPTIONS[name](batch, heads, q_len, kv_len)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients(monkeypatch, target, name, shape):
    monkeypatch.setattr(binding, "target", lambda: target)
    case = problem(shape, name)
    truth = gradients("reference", torch.float64, *case)
    eager = gradients("reference", torch.float32, *case)
    for ours, near, exact in zip(gradients("cpu", torch.float32, *case), eager, truth, strict=True):
        assert_as_exact(ours, near, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "sinks", "sink_logits"])
def test_gradients_in_half_precision(dtype, name):
    case = problem(SHAPES[3], name)
    rounded = tuple(x.to(dtype).float() for x in case[0])  # the same inputs for everyone
    truth = gradients("reference", torch.float64, rounded, *case[1:])
    eager = gradients("reference", dtype, rounded, *case[1:])
    for ours, near, exact in zip(
        gradients("cpu", dtype, rounded, *case[1:]), eager, truth, strict=True
    ):
        assert_as_exact(ours, near, exact, float(exact.abs().max()) * torch.finfo(dtype).eps)


def test_gradients_do_not_depend_on_who_was_first():
    before = torch.get_num_threads()
    case = problem((1, 4, 1, 1100, 1100, 32, 32), "causal")
    try:
        torch.set_num_threads(2)
        runs = [gradients("cpu", torch.float32, *case) for _ in range(3)]
        torch.set_num_threads(1)
        alone = gradients("cpu", torch.float32, *case)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, runs[0], strict=True))


def test_padded_keys_get_no_gradient():
    (q, k, v), weights, _ = problem(SHAPES[0], "causal")
    padding = torch.ones(1, 130, dtype=torch.bool)
    padding[:, 40:60] = False
    k[:, :, 40:60], v[:, :, 40:60] = torch.nan, torch.nan
    dq, dk, dv = gradients("cpu", torch.float32, (q, k, v), weights, {"key_padding": padding})
    assert dq.isfinite().all() and dk.isfinite().all()
    assert (dk[:, :, 40:60] == 0).all() and (dv[:, :, 40:60] == 0).all()


def test_what_has_no_gradient_says_so():
    (q, k, v), _, _ = problem(SHAPES[0], "causal")
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(Unsupported, match="gradients need plain keys"):
        attention(q.requires_grad_(), k, v, alibi_slopes=slopes, backend="cpu")
