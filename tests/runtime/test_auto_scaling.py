"""Options for texts beyond the trained length, against what transformers computes for a config."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

import saccade
from saccade.core import BadInput
from saccade.hf import rotary_frequencies
from saccade.hf.attach import attach
from saccade.hf.facts import facts_of
from saccade.rope import inverse_frequencies, parse
from saccade.runtime import ContextParams
from saccade.runtime.auto_scaling import reaching, what_fits
from tests.tiny_models import COMMON, tiny_config, tiny_model

BASE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    **BASE,
}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 128, **BASE}


def facts(config):
    return facts_of(config, name="tiny", n_ctx_train=None, dtype=torch.float32)


def llama(rope=None):
    config = LlamaConfig(**COMMON)
    if rope is not None:
        config.rope_parameters = rope
    return config


@pytest.mark.parametrize(
    ("own", "expected", "name"),
    [
        (None, {**YARN, "factor": 4.0, "original_max_position_embeddings": 512}, "YaRN x4.0"),
        (
            {"rope_type": "dynamic", "factor": 2.0, **BASE},
            {**YARN, "factor": 4.0, "original_max_position_embeddings": 512},
            "YaRN x2.0",
        ),
        ({**YARN, "factor": 4.0}, {**YARN, "factor": 16.0}, "YaRN x4.0"),
        ({**YARN, "factor": 8.0}, {**YARN, "factor": 16.0}, "YaRN x2.0"),
        (LLAMA3, {**LLAMA3, "factor": 16.0}, "Llama 3 x4.0"),
        (
            {"rope_type": "linear", "factor": 2.0, **BASE},
            {"rope_type": "linear", "factor": 8.0, **BASE},
            "linear x4.0",
        ),
    ],
    ids=["unscaled", "dynamic", "yarn", "yarn that reaches past its config", "llama3", "linear"],
)
def test_scaling_is_chosen_that_reaches_the_text(own, expected, name):
    config = llama(own)
    params, said = reaching(ContextParams(), facts(config), 2048)
    rule, base, _ = parse(expected, max_position_embeddings=512)
    wanted = inverse_frequencies(rule, base=base, rotary_dim=16)
    with attach(tiny_model(config), params) as attached:
        found = rotary_frequencies(attached.model)
    assert torch.allclose(found.inv_freq, wanted.inv_freq, rtol=1e-12)
    assert found.attention_factor == pytest.approx(wanted.attention_factor)
    assert params.n_ctx == 2048
    assert said and name in said and "2,048" in said and "--rope-scaling none" in said


@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling_type": "none"},
        {"rope_scaling_type": "ntk"},
        {"rope_freq_scale": 0.5},
        {"rope_freq_base": 1e6},
    ],
)
def test_what_was_chosen_stays(options):
    params, said = reaching(ContextParams(**options), facts(llama()), 2048)
    assert params == ContextParams(**options, n_ctx=2048) and said is None


def test_inside_the_trained_length_nothing_changes():
    assert reaching(ContextParams(), facts(llama()), 512) == (ContextParams(), None)


def test_yarn_of_the_config_counts_its_own_reach():
    known = facts(llama({**YARN, "factor": 8.0}))
    assert reaching(ContextParams(), known, 1024) == (ContextParams(n_ctx=1024), None)


def test_a_given_length_of_context_stays_and_bounds_the_text():
    given = ContextParams(n_ctx=400)
    assert reaching(given, facts(llama()), 2048) == (given, None)
    params, said = reaching(ContextParams(n_ctx=1024), facts(llama()), 2048)
    assert params.n_ctx == 1024 and said and "x2.0" in said


def test_the_length_that_was_given_as_trained_is_the_one_scaled():
    params, said = reaching(ContextParams(yarn_orig_ctx=256), facts(llama()), 512)
    assert params.rope_scaling_type == "yarn" and params.rope_freq_scale == 0.5
    assert said and "x2.0" in said


def test_with_a_window_and_sinks_positions_are_those_inside_the_cache():
    given = ContextParams(n_swa=64, n_sinks=4)
    assert reaching(given, facts(llama()), 100_000) == (given, None)


def test_a_window_beyond_the_trained_length_is_scaled_to_the_window():
    params, said = reaching(ContextParams(n_swa=1020, n_sinks=4), facts(llama()), 100_000)
    assert params.rope_freq_scale == 0.5 and params.n_ctx is None
    assert said and "1,024 tokens" in said


def test_a_window_without_sinks_is_told_to_have_them():
    given = ContextParams(n_swa=64)
    params, said = reaching(given, facts(llama()), 100_000)
    assert params == given and said and "--sinks" in said
    assert reaching(given, facts(llama()), 500)[1] is None


def test_layers_that_all_slide_need_no_scaling():
    assert reaching(ContextParams(), facts(tiny_config("mistral")), 4096)[1] is None


def test_a_table_of_positions_ends():
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    params, said = reaching(ContextParams(), facts(config), 100)
    assert params.rope_scaling_type is None and said and "table of 64 positions" in said


def test_positions_that_cannot_be_scaled_are_named():
    known = facts(llama())
    known = replace(known, positions=replace(known.positions, refusal="they are odd."))
    params, said = reaching(ContextParams(), known, 2048)
    assert params == ContextParams(n_ctx=2048) and said and "they are odd" in said


def test_longrope_is_left_as_it_was_searched():
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
        **BASE,
    }
    params, said = reaching(ContextParams(), facts(llama(rope)), 2048)
    assert params == ContextParams(n_ctx=2048) and said and "LongRoPE" in said


def gpt2():
    config = GPT2Config(
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return tiny_model(config)


def test_a_context_beyond_the_trained_length_says_so():
    model = tiny_model(llama())
    with saccade.Context(model, ContextParams(n_ctx=2048)) as ctx:
        assert len(ctx.notes) == 1 and "beyond the 512 tokens" in ctx.notes[0]
    scaled, _ = reaching(ContextParams(n_ctx=2048), facts(llama()), 2048)
    for params in (scaled, ContextParams(n_ctx=512), ContextParams(n_swa=64, n_sinks=4)):
        with saccade.Context(model, params) as ctx:
            assert ctx.notes == []


def test_what_does_not_fit_is_told_what_works():
    known = facts(llama())
    assert "yarn" in what_fits(ContextParams(), known, 600)
    assert "n_sinks" in what_fits(ContextParams(), known, 600)
    assert "yarn" not in what_fits(ContextParams(n_ctx=50), known, 100)
    assert "n_swa" not in what_fits(ContextParams(), facts(tiny_config("mistral")), 600)
    odd = replace(known, positions=replace(known.positions, refusal="they are odd."))
    assert "yarn" not in what_fits(ContextParams(), odd, 600)


@pytest.mark.parametrize("options", [{}, {"n_swa": 16, "n_sinks": 2}])
def test_a_text_beyond_a_table_of_positions_is_refused(options):
    with saccade.Context(gpt2(), ContextParams(**options)) as ctx:
        with pytest.raises(BadInput, match="table of 64 positions"):
            ctx.append(torch.arange(2, 72))
        assert len(list(ctx.stream(torch.arange(2, 62), n_predict=20))) == 5


def test_more_context_than_a_table_has_is_refused():
    with pytest.raises(BadInput, match="Lower n_ctx to 64"):
        saccade.Context(gpt2(), ContextParams(n_ctx=65))
