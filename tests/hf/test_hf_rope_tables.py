"""Tables that follow the length: a text equals one reading of the whole, however it was read."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Phi3Config

import saccade
from saccade.core import Unsupported
from saccade.hf import attach
from saccade.hf.rope import rotary_modules
from saccade.hf.rope_tables import FittedRotary, pristine, reaching
from saccade.hf.scaled_rotary import scaled_rotary
from saccade.runtime.params import ContextParams
from tests.tiny_models import COMMON, tiny_config, tiny_model

TRAINED = 32
LISTS = {
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.0 + 3.0 * i for i in range(8)],
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": TRAINED,
    **LISTS,
}
TEXT = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()


def phi3():
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": TRAINED}
    return tiny_model(Phi3Config(**{**COMMON, **lengths}, rope_parameters=dict(LONG)))


def llama(kind):
    if kind == "longrope":
        return tiny_model(tiny_config("llama", rope_parameters=LONG, max_position_embeddings=256))
    given = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    return tiny_model(tiny_config("llama", rope_parameters=given, max_position_embeddings=TRAINED))


MODELS = {"phi3": phi3, "longrope": lambda: llama("longrope"), "dynamic": lambda: llama("dynamic")}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def at_once(model, tokens):
    """Logits `[vocab]` behind a text, from one forward of transformers on fresh modules."""
    rotary = model.model.rotary_emb
    fresh = pristine(rotary)
    model.model.rotary_emb = fresh
    try:
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0, -1]
    finally:
        model.model.rotary_emb = rotary


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def last(ctx, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ctx.logits(ctx.append(tokens))[-1]


def greedy(model, tokens, count):
    """Tokens of a model that reads the whole text anew for each."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(at_once(model, text).argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("size", [16, 31, 33, 512])
@pytest.mark.parametrize("type_k", [None, "f32"])
def test_a_prompt_in_chunks(model, size, type_k):
    params = ContextParams(n_batch=size, n_ctx=256, type_k=type_k, type_v=type_k)
    with saccade.Context(model, params) as ctx:
        close(last(ctx, TEXT), at_once(model, TEXT))


def test_a_scaled_rule_in_chunks():
    model = tiny_model(tiny_config("llama", max_position_embeddings=TRAINED))
    params = ContextParams(n_ctx=128, rope_scaling_type="dynamic")
    with attach(model, params):
        expected = model(torch.tensor(TEXT)[None]).logits[0, -1]
    with saccade.Context(model, replace(params, n_batch=16)) as ctx:
        close(last(ctx, TEXT), expected)


@pytest.mark.parametrize("options", [{}, {"n_swa": 100}, {"page_size": 16}])
def test_generation_past_the_trained_length(model, options):
    params = ContextParams(n_ctx=256, **options)
    with saccade.Context(model, params) as ctx, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [token.token for token in ctx.stream(TEXT[:28], n_predict=8)]
    assert found == greedy(model, TEXT[:28], 8)


def test_dynamic_says_what_makes_it_slow():
    with saccade.Context(llama("dynamic"), ContextParams(n_ctx=256)) as ctx:
        ctx.append(TEXT[:40])
        with pytest.warns(UserWarning, match="Set rope_scaling_type='ntk' or 'yarn' with n_ctx"):
            ctx.append(TEXT[40:41])


@pytest.mark.parametrize("model", ["phi3", "longrope"], indirect=True)
def test_a_switch_is_read_again_once(model):
    with saccade.Context(model, ContextParams(n_ctx=256)) as ctx, warnings.catch_warnings():
        warnings.simplefilter("error")
        close(last(ctx, TEXT[:30]), at_once(model, TEXT[:30]))
        close(last(ctx, TEXT[30:33]), at_once(model, TEXT[:33]))
        assert ctx.cache.reaches == 33 and ctx.tokens == TEXT[:33]
        close(last(ctx, TEXT[33:40]), at_once(model, TEXT[:40]))
        assert ctx.cache.reaches == 33  # the same table serves


def test_after_a_rollback(model):
    """Keys of the longer text stay until the next tokens are known, then they are read again."""
    with saccade.Context(model, ContextParams(n_ctx=256)) as ctx:
        last(ctx, TEXT[:50])
        assert ctx.reuse([*TEXT[:20], 5, 5]) == 20
        other = [*TEXT[:20], 5, 6, 7]
        close(last(ctx, other[20:]), at_once(model, other))
        assert ctx.tokens == other


def test_after_a_context_shift(model):
    with saccade.Context(model, ContextParams(n_ctx=256)) as ctx:
        last(ctx, TEXT[:36])
        ctx.shift(4)
        kept = TEXT[:4] + TEXT[20:36]
        assert ctx.tokens == kept
        close(last(ctx, [9]), at_once(model, [*kept, 9]))


def test_a_full_context_goes_on(model):
    """n_keep removes tokens, and what is left may have the tables of a shorter text."""
    with saccade.Context(model, ContextParams(n_ctx=40, n_keep=4)) as ctx:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [token.token for token in ctx.stream(TEXT[:36], n_predict=6)]
        assert len(found) == 6 and len(ctx.tokens) < 36
        close(last(ctx, [9]), at_once(model, ctx.tokens))


def test_in_a_session(model, tmp_path):
    """A session knows the table of its keys, also where its length alone does not say it."""
    params = ContextParams(n_ctx=256)
    with saccade.Context(model, params) as ctx:
        last(ctx, TEXT[:50])
        ctx.reuse(TEXT[:21])
        saccade.save_session(tmp_path / "x", ctx)
    with saccade.Context(model, params) as ctx:
        saccade.load_session(tmp_path / "x", ctx)
        assert ctx.tokens == TEXT[:20]
        close(last(ctx, TEXT[20:25]), at_once(model, TEXT[:25]))


def test_compressed_keys_are_not_read_again(model):
    params = ContextParams(n_ctx=256, kv_policy="snapkv", kv_budget=20)
    with saccade.Context(model, params) as ctx:
        ctx.append(TEXT[:30])
        ctx.compress()
        with pytest.raises(Unsupported, match="a compressed cache cannot be read again"):
            ctx.append(TEXT[30:36])
        assert ctx.tokens == TEXT[:30] and ctx.seen == 30


@torch.no_grad()
@pytest.mark.parametrize("cache", ["none", "ours", "theirs", "f32"])
def test_generate_of_an_attached_model(model, cache):
    prompt = torch.tensor(TEXT[:28])[None]
    params = ContextParams(type_k="f32", type_v="f32") if cache == "f32" else ContextParams()
    with attach(model, params) as attached:
        given = {"ours": attached.new_cache, "theirs": DynamicCache}.get(cache, lambda: None)()
        found = model.generate(
            prompt, past_key_values=given, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert found[0, 28:].tolist() == greedy(model, TEXT[:28], 8)
    assert "prepare_inputs_for_generation" not in vars(model)


@torch.no_grad()
def test_generate_with_padding(model):
    """Each row has as many positions as tokens; the longest decides, as in one forward."""
    rows, mask = torch.zeros(2, 28, dtype=torch.long), torch.ones(2, 28, dtype=torch.long)
    rows[0], rows[1, 8:] = torch.tensor(TEXT[:28]), torch.tensor(TEXT[30:50])
    mask[1, :8] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with attach(model) as attached:
        found = model.generate(
            rows, attention_mask=mask, past_key_values=attached.new_cache(), **options
        )
    assert found[0, 28:].tolist() == greedy(model, TEXT[:28], 8)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["ours", "theirs"])
def test_generate_under_a_scaled_rule(cache):
    model = tiny_model(tiny_config("llama", max_position_embeddings=TRAINED))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with attach(model, ContextParams(rope_scaling_type="dynamic", n_ctx=128)) as attached:
        text = torch.tensor(TEXT[:28])[None]
        given = attached.new_cache() if cache == "ours" else None
        found = model.generate(text, past_key_values=given, **options)
        while text.shape[1] < 36:
            text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, text)


@torch.no_grad()
def test_beams(model):
    """Both rows of the beams are read again."""
    prompt = torch.tensor(TEXT[:28])[None]
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with attach(model) as attached:
        ours = model.generate(prompt, past_key_values=attached.new_cache(), **options)
        uncached = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(ours, uncached)


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 40])
def test_generate_reads_a_prompt_in_chunks(model, size):
    prompt = torch.tensor(TEXT)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with attach(model) as attached:
        found = model.generate(
            prompt, past_key_values=attached.new_cache(), prefill_chunk_size=size, **options
        )
    assert found[0, 60:].tolist() == greedy(model, TEXT, 4)


@torch.no_grad()
def test_direct_calls_that_mix_tables_are_refused(model):
    with attach(model) as attached:
        cache = attached.new_cache()
        model(torch.tensor(TEXT[:30])[None], past_key_values=cache)
        with pytest.raises(Unsupported, match="holds keys of a text of 30 tokens"):
            model(torch.tensor(TEXT[30:40])[None], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_fitted_rotary_forgets_what_it_was_called_with(kind):
    module = llama(kind).model.rotary_emb
    rotary, x = FittedRotary(module), torch.zeros(1, 1, 16)
    near = torch.arange(8)[None]
    expected = [pristine(module)(x, torch.arange(n)[None])[0][:, :8] for n in (8, 40, 60)]
    for length, cos in zip((None, 40, 60, None), [*expected, expected[0]], strict=True):
        assert torch.equal(reaching(length, rotary, x, near)[0], cos)
    assert torch.equal(module.inv_freq, module.original_inv_freq)


class CopiesFromHost(TorchDispatchMode):
    """Counts tensors that are copied from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copied and args[-1 if func is torch.ops.aten.copy_.default else 0].device.type == "cpu":
            self.count += result.device.type != "cpu"
        return result


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "longrope"])
def test_scaled_tables_copy_nothing_from_the_host_twice(kind):
    """A copy from the host in the middle of a step cannot be captured in a CUDA graph."""
    model = llama("longrope") if kind == "longrope" else tiny_model(tiny_config("llama"))
    params = ContextParams(rope_scaling_type=None if kind == "longrope" else kind, n_ctx=4096)
    if kind == "longrope":
        params = ContextParams(rope_freq_base=20000.0)
    module = next(rotary_modules(model))
    rotary = scaled_rotary(module, model.config, params)
    x, at = torch.zeros(1, 1, 1, device="meta"), torch.zeros(1, 1, dtype=torch.int64, device="meta")
    counts = []
    for _ in range(3):
        with CopiesFromHost() as copies:
            reaching(200, rotary, x, at)
        counts.append(copies.count)
    assert counts == [1, 0, 0]
    cos, _ = rotary(torch.zeros(1), torch.tensor([[3]]))  # and back on the CPU
    assert cos.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_scaled_positions_decode_by_a_captured_step(kind):
    model = tiny_model(tiny_config("llama")).to("cuda", torch.bfloat16)
    stream = torch.cuda.current_stream()
    with saccade.Context(model, ContextParams(rope_scaling_type=kind, n_ctx=4096)) as ctx:
        assert len(list(ctx.stream(TEXT, n_predict=4))) == 4
        assert ctx._use_step is True
    assert torch.cuda.current_stream() == stream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_a_cast_has_rounded_are_scaled_from_the_config(dtype):
    config = tiny_config("llama")
    params = ContextParams(rope_scaling_type="yarn", rope_freq_scale=0.5)
    cast = tiny_model(config).to(dtype)
    plain = tiny_model(config)
    at = torch.arange(200)[None]
    tables = [
        scaled_rotary(next(rotary_modules(model)), config, params)(torch.zeros(1), at)
        for model in (cast, plain)
    ]
    for ours, exact in zip(*tables, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_other_frequencies_than_the_configs_are_refused_in_half_precision_too():
    model = tiny_model(tiny_config("llama")).to(torch.bfloat16)
    rotary = next(rotary_modules(model))
    rotary.original_inv_freq = rotary.original_inv_freq * 1.1
    with pytest.raises(Unsupported, match="does not return the tables"):
        scaled_rotary(rotary, model.config, ContextParams(rope_scaling_type="linear"))
