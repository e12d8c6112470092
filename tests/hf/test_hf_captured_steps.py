"""Steps of `generate()` under `attach` as a DecodeStep computes them; on a GPU they are captured.

Without a GPU the same code runs, its steps eagerly.
"""

import gc
import importlib
import warnings
import weakref

import pytest
import torch

import saccade
from saccade.hf.captured_steps import decode_in_graphs
from saccade.runtime import ContextParams
from saccade.runtime.step import DecodeStep
from saccade.sparse import BlockTopK
from tests.tiny_models import tiny_config, tiny_model

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"
pytestmark = pytest.mark.gpu if HOPPER else []
PROMPT = torch.arange(3, 60)[None]
NEW = 9
OFF = {"fused_layers": False}
CACHES = {
    "dense": {},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "window": {"n_swa": 20, "n_sinks": 2},
    "compressed": {"kv_policy": "snapkv", "kv_budget": 40},
    "sparse": {"sparse": BlockTopK(block=8, top=2, window_blocks=1)},
}


@pytest.fixture(autouse=True)
def _graphs_everywhere(monkeypatch):
    attaching = importlib.import_module("saccade.hf.attach")
    monkeypatch.setattr(attaching, "decode_in_kernels", decode_in_graphs)


@pytest.fixture
def steps(monkeypatch):
    """How many rows each step had."""
    seen = []
    original = DecodeStep.__call__

    def noted(self, tokens):
        found = original(self, tokens)
        seen.append(len(tokens))
        return found

    monkeypatch.setattr(DecodeStep, "__call__", noted)
    return seen


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return tiny_model(tiny_config(request.param)).to(DEVICE)


def generated(model, params, prompt=PROMPT, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with saccade.attach(model, ContextParams(**params)):
        return model.generate(prompt.to(DEVICE), **options).tolist()


@pytest.mark.parametrize("cache", CACHES)
def test_generated_tokens_are_those_without_steps(model, cache, steps):
    expected = generated(model, CACHES[cache] | OFF)
    assert not steps
    assert generated(model, CACHES[cache]) == expected
    # The first step behind a prompt that is to be compressed is the model's own.
    assert steps == [1] * (NEW - 1 - (cache == "compressed"))
    assert generated(model, CACHES[cache]) == expected  # another cache


def test_batches_samples_and_beams(model, steps):
    prompt = torch.cat([PROMPT, PROMPT + 1])
    for options, rows in (
        ({}, 2),
        ({"do_sample": True, "temperature": 0.7}, 2),
        ({"num_beams": 3}, 6),
    ):
        found = []
        for extra in (OFF, {}):
            torch.manual_seed(0)
            found.append(generated(model, extra, prompt, **options))
        assert found[0] == found[1] and set(steps) == {rows}
        steps.clear()


@pytest.mark.parametrize("cache", CACHES)
def test_in_inference_mode(model, cache, steps):
    expected = generated(model, CACHES[cache] | OFF)
    with torch.inference_mode():
        assert generated(model, CACHES[cache]) == expected
    assert steps


def test_an_inner_run_without_fused_layers_has_no_steps(model, steps):
    with saccade.attach(model), saccade.attach(model, ContextParams(**OFF)) as inner:
        cache = inner.new_cache()
        model.generate(PROMPT.to(DEVICE), past_key_values=cache, max_new_tokens=4)
    assert not steps


def test_another_batch_over_the_same_run(model, steps):
    with saccade.attach(model):
        for rows in (1, 2, 1):
            model.generate(PROMPT.to(DEVICE).expand(rows, -1), max_new_tokens=4, do_sample=False)
    assert steps == [1] * 3 + [2] * 3 + [1] * 3


def test_what_is_no_plain_step_is_the_models_own(model, steps):
    mask = (torch.arange(57) > 3).long().expand(2, -1).clone()
    mask[1] = 1
    prompt = PROMPT.expand(2, -1)
    options = {"attention_mask": mask.to(DEVICE)}
    assert generated(model, {}, prompt, **options) == generated(model, OFF, prompt, **options)
    generated(model, {}, output_hidden_states=True, return_dict_in_generate=False)
    with saccade.attach(model):
        model.generate(PROMPT.to(DEVICE), max_new_tokens=3, use_cache=False)
        model.generate(PROMPT.to(DEVICE), max_new_tokens=3, cache_implementation="dynamic")
    assert not steps


def test_caches_that_need_the_host_are_named_once(model, steps):
    expected = generated(model, {"page_size": 16} | OFF)
    with pytest.warns(UserWarning, match="not captured: layer 0 has a PagedCache") as said:
        assert generated(model, {"page_size": 16}) == expected
    assert len([x for x in said if "captured" in str(x.message)]) == 1 and not steps


def test_a_cache_is_freed_with_its_last_reference(model, steps):
    gc.disable()
    try:
        with saccade.attach(model) as attached:
            cache = attached.new_cache()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.generate(PROMPT.to(DEVICE), past_key_values=cache, max_new_tokens=4)
            gone = weakref.ref(cache.stores[0])
            assert steps
            del cache
            assert gone() is None
    finally:
        gc.enable()


def test_the_model_is_put_back(model, steps):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    generated(model, {})
    assert steps
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
