"""Steps through the C++ layers equal those through the model itself, for whatever is cached."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CwmConfig,
    GemmaConfig,
    GraniteConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    SeedOssConfig,
    SmolLM3Config,
)

import saccade
from saccade.hf.attach import make_run
from saccade.hf.decoder_layers import describe
from saccade.hf.fused_decoder import FusedDecoder, fused_decoder
from saccade.hf.model import HFModel
from saccade.hf.packed_layers import HalfLinear, HalfWeight, PackedLinear, WeightStore
from saccade.ops.attention.cpu.binding import BUILT
from saccade.ops.linear import quantized
from saccade.runtime import ContextParams
from saccade.sparse import BlockTopK, BlockTopP, FromLength, Quest, Strided
from tests.tiny_models import COMMON, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
OTHERS = {
    "cwm": lambda: CwmConfig(**COMMON, sliding_window=8),
    "gemma": lambda: GemmaConfig(**COMMON),
    "granite": lambda: GraniteConfig(
        **COMMON,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=0.5,
    ),
    "olmo2": lambda: Olmo2Config(**COMMON),
    "olmo3": lambda: Olmo3Config(**COMMON, sliding_window=8),
    "phi3 with a window": lambda: Phi3Config(**COMMON, sliding_window=8),
    "seed_oss": lambda: SeedOssConfig(**COMMON),
    "smollm3": lambda: SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 0, 1]),
}
PROMPT, TOKENS = torch.arange(3, 60), [5, 9, 17, 40]
PLAIN = ContextParams(fused_layers=False)
CACHES = {
    "dense": {},
    "float16": {"type_k": "f16", "type_v": "f16"},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "fp8": {"type_k": "fp8", "type_v": "fp8"},
    "pages": {"page_size": 16},
    "window": {"n_swa": 24, "n_sinks": 2},
    "scaled": {"rope_scaling_type": "yarn", "rope_freq_scale": 0.5},
    "block top-k": {"sparse": BlockTopK(block=8, top=1, window_blocks=1)},
    "quest in pages": {"sparse": Quest(block=8, top=2, window_blocks=1), "page_size": 16},
    "strided": {"sparse": Strided(block=8, window_blocks=1)},
    "blocks of two": {"sparse": Quest(block=2, top=3, window_blocks=1)},
}
LONG = {
    "dense": {},
    "int8": CACHES["int8"],
    "int4": CACHES["int4"],
    "ring": {"n_swa": 24, "n_sinks": 2},
    "int8 ring": {"n_swa": 128, **CACHES["int8"]},
    "int4 ring with sinks": {"n_swa": 128, "n_sinks": 3, **CACHES["int4"]},
    "block top-k": {"sparse": BlockTopK(block=16, top=2, window_blocks=1)},
    "block top-p": {"sparse": BlockTopP(block=16, p=0.5, window_blocks=1)},
    "quest": {"sparse": Quest(block=8, top=3, window_blocks=1)},
    "strided": {"sparse": Strided(block=16, window_blocks=1)},
    "from a length": {
        "sparse": FromLength(pattern=BlockTopK(block=16, top=1, window_blocks=1), least=90)
    },
    "int8 quest": {"sparse": Quest(block=16, top=2, window_blocks=1), **CACHES["int8"]},
}


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """Which way each step went: "run" for one call of all layers, "layer" for one by itself."""
    seen: list[str] = []
    for name, label in {"_run": "run", "_layer": "layer"}.items():
        original = getattr(FusedDecoder, name)

        def counted(self, *args, original=original, label=label):
            result = original(self, *args)
            if result != 0:  # `_run` says how many layers it computed
                seen.append(label)
            return result

        monkeypatch.setattr(FusedDecoder, name, counted)
    return seen


def lively(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose norms and biases are no ones and zeros."""
    model = tiny_model(OTHERS[family]() if family in OTHERS else tiny_config(family))
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    return model.to(dtype)


def logits(model: nn.Module, params: ContextParams) -> Tensor:
    """Of each step behind a prompt."""
    with saccade.Context(model, params, check="off") as ctx:
        ctx.append(PROMPT)
        return torch.stack([ctx.logits(ctx.append([token])[0]) for token in TOKENS])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_steps_equal_the_models_own(family, cache, steps):
    model, options = lively(family), CACHES[cache]
    expected = logits(model, ContextParams(fused_layers=False, **options))
    assert not steps
    found = logits(model, ContextParams(**options))
    assert steps, "the C++ layers did not run"
    assert torch.allclose(found, expected, atol=3e-5 * expected.abs().max())


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("cache", ["dense", "int8"])
def test_steps_of_other_families_equal_the_models_own(family, cache, steps):
    test_steps_equal_the_models_own(family, cache, steps)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_weights_are_within_their_rounding(family):
    """Against the same weights in float32; the C++ step keeps float32 between its operations."""
    model = lively(family, torch.bfloat16)
    exact = logits(copy.deepcopy(model).float(), PLAIN)
    ours = (logits(model, ContextParams()) - exact).abs().max()
    theirs = (logits(model, PLAIN) - exact).abs().max()
    assert 0 < ours <= 1.5 * theirs


def packed(model: nn.Module, bits: int | torch.dtype) -> nn.Module:
    """The model with stored weights in all linear layers: of 4 or 8 bits, or of a half dtype."""
    for module in list(model.modules()):
        for name, part in list(module._modules.items()):
            if type(part) is not nn.Linear:
                continue
            half = isinstance(bits, torch.dtype)
            weight = part.weight.data
            stored = HalfWeight(weight.to(bits)) if half else quantized(weight, bits)
            layer = HalfLinear if half else PackedLinear
            store = WeightStore(stored)
            setattr(module, name, layer(store, part.bias, torch.float32, training=False))
    return model


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("bits", [4, 8, torch.float16])
def test_packed_weights_equal_the_same_numbers_unpacked(bits, family, steps):
    """Up to what products of packed weights may round: their inputs, to bfloat16."""
    model = packed(lively(family), bits)
    plain = lively(family)
    names = dict(model.named_modules())
    for name, part in plain.named_modules():
        if type(part) is nn.Linear:
            part.weight.data = names[name].weight.float()
    expected = logits(plain, PLAIN)
    found = logits(model, ContextParams())
    assert steps
    assert torch.allclose(found, expected, atol=0.02 * expected.abs().max())
    assert torch.allclose(found, logits(model, PLAIN), atol=0.02 * expected.abs().max())


@pytest.mark.parametrize("cache", LONG)
def test_one_call_for_all_layers_from_token_to_token(cache, steps):
    """Through growing buffers, full groups that are quantized, and rings that go round."""
    model, found = lively("gemma3" if cache == "dense" else "llama"), []
    for fused in (None, False):
        params = ContextParams(fused_layers=fused, **LONG[cache])
        with saccade.Context(model, params, check="off") as ctx:
            ctx.append(torch.arange(150) % 90 + 3)
            hidden = [ctx.append([3 + 7 * i % 90])[0] for i in range(80)]
            found.append(torch.stack([ctx.logits(x) for x in hidden[::8]]))
            found.append([store.state().progress for store in ctx.cache.stores])
    assert steps == ["run"] * 80
    # One cache dequantizes to float16 and another not; a number between two codes may be either.
    assert torch.allclose(found[0], found[2], atol=3e-3 * found[2].abs().max())
    assert found[1] == found[3]


def test_layers_between_those_of_one_call(steps):
    """float16 recent tokens hold small values badly, so such a layer's are given to its cache."""
    model = lively("llama")
    model.model.layers[1].self_attn.v_proj.weight.data *= 1e-6
    expected = logits(model, ContextParams(fused_layers=False, **CACHES["int8"]))
    found = logits(model, ContextParams(**CACHES["int8"]))
    after = ["run"] * (len(model.model.layers) > 2)
    assert steps == ["run", "layer", *after] * len(TOKENS)
    assert torch.allclose(found, expected, atol=3e-5 * expected.abs().max())


def test_numbers_that_a_quantized_cache_refuses():
    """One token whose keys are too large: an error as of the model's own forward, then go on."""
    model, found = lively("llama"), []
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows[:, 0] = 0
        rows[99] = 0
        rows[99, 0] = 1
        model.model.layers[0].input_layernorm.weight[0] = 1e8
    for fused in (False, None):
        params = ContextParams(fused_layers=fused, **CACHES["int8"])
        with saccade.Context(model, params, check="off") as ctx:
            ctx.append(PROMPT)
            ctx.append([5])
            with pytest.raises(ValueError, match="a quantized cache takes keys of magnitudes"):
                ctx.append([99])
            assert ctx.seen == len(PROMPT) + 1
            found.append(ctx.logits(ctx.append([6])[0]))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "int8", "window", "block top-k", "blocks of two"])
@pytest.mark.parametrize("rows", [(1, 3), (2, 1), (4, 2), (3, 1)])
def test_several_rows_and_tokens(rows, name, steps):
    """Rows of a batch, and several tokens of a row, against the model's own forward."""
    model, tokens = lively("qwen3"), torch.randint(3, 99, rows)
    found = []
    for params in (replace(PLAIN, **CACHES[name]), ContextParams(**CACHES[name])):
        with HFModel(model).attached(params) as attached, torch.inference_mode():
            cache = attached.new_cache(params)
            attached.hidden(torch.arange(rows[0] * 20).view(rows[0], 20) + 3, cache)
            found.append(attached.hidden(tokens, cache))
            found[-1] = attached.logits(attached.hidden(tokens, cache) + found[-1])
    at_once = rows[1] <= {"dense": 8, "block top-k": 8, "blocks of two": 2}.get(name, 1)
    assert steps == (["run"] * 2 if at_once else ["layer"] * 2 * len(model.model.layers))
    assert torch.allclose(found[1], found[0], atol=1e-4)


def test_the_first_tokens_of_a_text_too(steps):
    """Caches are empty then, so they allocate as they are told of keys."""
    model, found = lively("llama"), []
    for params in (PLAIN, ContextParams()):
        with saccade.Context(model, params, check="off") as ctx:
            found.append(ctx.append(TOKENS[:3], wanted=3))
    assert "layer" in steps and torch.allclose(found[1], found[0], atol=1e-4)


def test_rolling_back_and_sessions(tmp_path, steps):
    model, path = lively("gemma3"), tmp_path / "text.saccade"
    found = []
    for params in (PLAIN, ContextParams()):
        with saccade.Context(model, params, check="off") as ctx:
            ctx.append(PROMPT)
            ctx.append([7])
            ctx.append([8])
            ctx.reuse([*PROMPT.tolist(), 7, 9])
            ctx.append([9])
            saccade.save_session(path, ctx)
        with saccade.Context(model, params, check="off") as ctx:
            saccade.load_session(path, ctx)
            found.append([each.token for each in ctx.stream([11], n_predict=6)])
    assert steps and found[0] == found[1]


def _hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def _adapter(model):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def _new_data(model):
    norm = model.model.layers[0].input_layernorm
    norm.weight.data = norm.weight.data * 3


def _in_place(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)


def _forward(model):
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) * 2


@pytest.mark.parametrize("change", [_hook, _adapter, _new_data, _in_place, _forward])
def test_a_model_changed_while_a_context_is_open_computes_what_it_is(change):
    """Hooks, adapters and new weights count from the next token on."""
    model, found = lively("llama"), []
    with saccade.Context(model, check="off") as ctx, saccade.Context(model, PLAIN) as plain:
        for each in (ctx, plain):
            each.append(PROMPT)
            each.append([5])
        before = ctx.append([6])
        plain.append([6])
        change(model)
        found = [each.logits(each.append([9])) for each in (ctx, plain)]
    assert before.isfinite().all() and torch.allclose(*found, atol=1e-4)


def test_what_is_not_listed_is_not_described(monkeypatch):
    assert describe(tiny_model(tiny_config("llama"))) is not None
    assert describe(tiny_model(tiny_config("gpt_oss"))) is None
    hooked = tiny_model(tiny_config("llama"))
    _hook(hooked)
    assert describe(hooked) is None


@pytest.mark.parametrize(
    "params", [PLAIN, ContextParams(rope_scaling_type="dynamic", yarn_orig_ctx=64, n_ctx=512)]
)
def test_options_that_the_c_layers_do_not_take(params):
    run = make_run(tiny_model(tiny_config("llama")), params, serves_every_call=False)
    assert fused_decoder(run) is None
