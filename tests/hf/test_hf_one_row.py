"""Layers for one row: found by example, used in steps alone, equal to what they replace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.hf.attach import _set
from saccade.hf.fused_layers import is_decoder_layer, is_gated, one_row_forwards
from saccade.hf.fused_norms import plain_norms, shifted_norms
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


def replaced(model):
    norms = list(plain_norms(model))
    rows = one_row_forwards(model, [norm for norm, _ in norms])
    return [*norms, *shifted_norms(model), *rows]


def stepped(model, params, replacing):
    with saccade.Context(model, params) as ctx:
        if replacing:
            for module, forward in replaced(model):
                _set(ctx._stack, module, "forward", forward)
        ctx.append(PROMPT)
        step = DecodeStep(ctx.model, ctx.cache)
        return torch.cat([step(token) for token in TOKENS])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_stay_what_they_were(family, calls):
    model = tiny_model(tiny_config(family))
    expected = stepped(model, ContextParams(), False)
    assert not calls
    assert torch.allclose(stepped(model, ContextParams(), True), expected, atol=2e-5)
    assert calls
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_layer_is_six_launches(family, calls):
    model = tiny_model(tiny_config(family))
    stepped(model, ContextParams(), True)
    heads = ["norm of heads"] * 2 if family == "qwen3" else []
    layer = ["norm", 3, *heads, 1, "sum and norm", "gated", 1]
    assert calls == (layer * model.config.num_hidden_layers + ["norm", 1]) * len(TOKENS)


def test_prompts_and_batches_are_left_alone(calls):
    model = tiny_model(tiny_config("llama"))
    with saccade.Context(model) as ctx:
        for module, forward in replaced(model):
            _set(ctx._stack, module, "forward", forward)
        ctx.logits(ctx.append(PROMPT))
        ctx.logits(ctx.append([5]))  # one token, but no step: every launch costs the host
    assert not calls


def test_biases_come_along(calls):
    model = tiny_model(tiny_config("qwen2"))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    expected = stepped(model, ContextParams(), False)
    assert torch.allclose(stepped(model, ContextParams(), True), expected, atol=2e-5)


def test_what_differs_from_the_formula_is_not_replaced():
    model = tiny_model(tiny_config("llama"))
    layer = model.model.layers[0]
    norms = {id(layer.post_attention_layernorm)}
    assert is_gated(layer.mlp) and is_decoder_layer(layer, norms)
    assert not is_decoder_layer(layer, set())
    layer.mlp.act_fn = nn.GELU()
    assert not is_gated(layer.mlp) and not is_decoder_layer(layer, norms)
    gemma = tiny_model(tiny_config("gemma2")).model.layers[0]
    assert not is_gated(gemma.mlp)
    assert not is_decoder_layer(gemma, {id(gemma.post_attention_layernorm)})


def test_norms_of_one_plus_weight():
    """Gemma's, four a layer and one behind the last."""
    for family, count in (("llama", 0), ("gemma2", 17)):
        model = tiny_model(tiny_config(family))
        found = list(shifted_norms(model))
        assert len(found) == count
        for module, forward in found:
            x = torch.randn(2, 3, len(module.weight))
            assert torch.equal(forward(x), module(x))  # but in steps


def test_hooks_and_other_forwards_are_respected():
    model = tiny_model(tiny_config("llama"))
    first, second = model.model.layers[:2]
    first.mlp.up_proj.register_forward_hook(lambda *_: None)
    second.self_attn.q_proj.forward = second.self_attn.q_proj.forward
    found = dict(replaced(model))
    assert first not in found and first.mlp not in found and first.mlp.up_proj not in found
    assert second in found and second.self_attn.q_proj not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]
)
def test_captured_steps_err_no_more_than_eager_ones(family, monkeypatch):
    """bf16 on a card against float32: at most twice the error of transformers' own sdpa."""
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
