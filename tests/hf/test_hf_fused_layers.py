"""Fused layers: of allowlisted classes, in steps of one row, equal to what they replace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.hf.allowlist import kind_of
from saccade.hf.fused_layers import fused_forwards, is_decoder_layer, is_gated
from saccade.ops import gemv
from saccade.runtime import ContextParams, DecodeStep
from tests.tiny_models import tiny_config, tiny_model

PROMPT, TOKENS = torch.arange(3, 40), [5, 9, 17]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss"]


@pytest.fixture
def calls(monkeypatch):
    """The kernels' formulas on the CPU; what was asked of them."""
    asked = []

    def linears(x, weights, biases):
        asked.append(len(weights))
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]

    def gated_mlp(x, gate, up):
        asked.append("gated")
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    def add_rms_norm(a, b, weight, eps):
        asked.append("sum and norm")
        return a + b, F.rms_norm(a + b, weight.shape, weight, eps)

    def rms_norm(x, weight, eps, offset=0.0):
        asked.append("norm" if x.ndim == 3 else "norm of heads")
        return F.rms_norm(x, weight.shape, weight + offset, eps)

    def supports_rms_norm(x, weight):
        return True

    def supports(x, *weights):
        return x.numel() == x.shape[-1] and all(w.shape[1] == x.shape[-1] for w in weights)

    for function in (linears, gated_mlp, add_rms_norm, rms_norm, supports_rms_norm, supports):
        monkeypatch.setattr(gemv, function.__name__, function)
    return asked


FUSED, PLAIN = ContextParams(fused_layers=True), ContextParams(fused_layers=False)


def stepped(model, params):
    with saccade.Context(model, params) as ctx:
        ctx.append(PROMPT)
        step = DecodeStep(ctx.model, ctx.cache)
        return torch.cat([step(token) for token in TOKENS])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_stay_what_they_were(family, calls):
    model = tiny_model(tiny_config(family))
    expected = stepped(model, PLAIN)
    assert not calls
    assert torch.allclose(stepped(model, FUSED), expected, atol=2e-5)
    assert calls
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_layer_is_six_launches(family, calls):
    model = tiny_model(tiny_config(family))
    stepped(model, FUSED)
    heads = ["norm of heads"] * 2 if family == "qwen3" else []
    layer = ["norm", 3, *heads, 1, "sum and norm", "gated", 1]
    assert calls == (layer * model.config.num_hidden_layers + ["norm", 1]) * len(TOKENS)


def test_prompts_and_batches_are_left_alone(calls):
    model = tiny_model(tiny_config("llama"))
    with saccade.Context(model, FUSED) as ctx:
        ctx.logits(ctx.append(PROMPT))
        ctx.logits(ctx.append([5]))  # one token, but no step: every launch costs the host
    assert not calls


def test_biases_come_along(calls):
    model = tiny_model(tiny_config("qwen2"))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    expected = stepped(model, PLAIN)
    assert torch.allclose(stepped(model, FUSED), expected, atol=2e-5)


def test_what_differs_from_the_formula_is_not_replaced():
    layer = tiny_model(tiny_config("llama")).model.layers[0]
    assert is_gated(layer.mlp) and is_decoder_layer(layer)
    layer.mlp.act_fn = nn.GELU()
    assert not is_gated(layer.mlp) and not is_decoder_layer(layer)
    gemma = tiny_model(tiny_config("gemma2")).model.layers[0]
    assert not is_gated(gemma.mlp) and not is_decoder_layer(gemma)


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [
        ("llama", "rms_norm", 9),
        ("qwen3", "rms_norm", 17),
        ("gemma2", "rms_norm_plus_one", 17),
        ("gpt_oss", "rms_norm", 9),
    ],
)
def test_norms_equal_what_they_replace(family, kind, count):
    """weight * x / rms(x), and Gemma's with 1 + weight: four a layer and one behind the last."""
    found = fused_forwards(tiny_model(tiny_config(family)), lambda: True)
    norms = [pair for pair in found if kind_of(type(pair[0])) == kind]
    assert len(norms) == count
    for module, forward in norms:
        x = torch.randn(2, 3, len(module.weight))
        assert torch.allclose(forward(x), module(x), atol=1e-6)


def test_hooks_and_other_forwards_are_respected():
    model = tiny_model(tiny_config("llama"))
    first, second = model.model.layers[:2]
    first.mlp.up_proj.register_forward_hook(lambda *_: None)
    second.self_attn.q_proj.forward = second.self_attn.q_proj.forward
    found = dict(fused_forwards(model, lambda: True))
    assert first not in found and first.mlp not in found and first.mlp.up_proj not in found
    assert second in found and second.self_attn.q_proj not in found


def test_an_interrupted_step_leaves_no_products(calls, monkeypatch):
    """What was computed for k and v is not given to the next input."""
    model = tiny_model(tiny_config("llama"))
    expected = stepped(model, PLAIN)
    key_projection = model.model.layers[1].self_attn.k_proj
    with saccade.Context(model, FUSED) as ctx:
        ctx.append(PROMPT)
        step = DecodeStep(ctx.model, ctx.cache)
        fused, failing = key_projection.forward, [True]

        def once(x):
            if failing.pop() if failing else False:
                raise KeyboardInterrupt
            return fused(x)

        monkeypatch.setattr(key_projection, "forward", once)
        with pytest.raises(KeyboardInterrupt):
            step(TOKENS[0])
        found = torch.cat([step(token) for token in TOKENS])
        monkeypatch.undo()
    assert torch.allclose(found, expected, atol=2e-5)


def test_fused_layers_are_an_option(calls):
    """Off on a CPU, off for attach, and each of two live contexts has its own."""
    model = tiny_model(tiny_config("llama"))
    stepped(model, ContextParams())
    with saccade.attach(model):
        parts = [part for part in model.modules() if part is not model.model]
        assert not any("forward" in vars(part) for part in parts)
    assert not calls
    with saccade.Context(model, FUSED) as fused, saccade.Context(model, PLAIN) as plain:
        for ctx, wanted in ((plain, False), (fused, True), (plain, False)):
            calls.clear()
            ctx.append(PROMPT)
            DecodeStep(ctx.model, ctx.cache)(5)
            assert bool(calls) == wanted
    with saccade.attach(model, FUSED):
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]
)
def test_captured_steps_err_no_more_than_eager_ones(family, monkeypatch):
    """bf16 on a GPU against float32: at most twice the error of transformers' own sdpa."""
    truth_of = tiny_model(tiny_config(family)).cuda()
    model = tiny_model(tiny_config(family)).to("cuda", torch.bfloat16)
    truth_of.load_state_dict(model.state_dict())
    tokens = [(7 * i) % 120 + 3 for i in range(12)]
    whole = torch.cat((PROMPT, torch.tensor(tokens))).cuda()[None]
    with torch.inference_mode():
        truth = truth_of(whole).logits[0, len(PROMPT) :]
        eager = model(whole).logits[0, len(PROMPT) :].float()
    launches, linears = [], gemv.linears
    monkeypatch.setattr(gemv, "linears", lambda *a: launches.append(1) or linears(*a))
    with saccade.Context(model) as ctx:
        ctx.append(PROMPT)
        step = DecodeStep(ctx.model, ctx.cache)
        found = torch.cat([step(token).clone() for token in tokens])
    served = torch.cuda.get_device_capability()[0] == 9
    assert bool(launches) == served
    assert (found - truth).norm() <= 2 * (eager - truth).norm()
