"""torch.compile of an attached model: no graph break more than with sdpa, and the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from saccade.hf import attach
from saccade.runtime.params import ContextParams
from tests.tiny_models import tiny_config, tiny_model

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
PACKED = {
    "position_ids": torch.cat((torch.arange(7), torch.arange(5)))[None],
    "use_cache": False,
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def padded(model, run):
    return run(IDS, attention_mask=PADDED).logits[PADDED.bool()]


def packed(model, run):
    return run(IDS[:1], **PACKED).logits


def in_parts(model, run, cache):
    parts = [run(part, past_key_values=cache).logits for part in IDS.split([8, 4], dim=1)]
    return torch.cat(parts, dim=1)


def dynamic(model, run):
    return in_parts(model, run, DynamicCache(config=model.config))


def static(model, run):
    return in_parts(model, run, StaticCache(config=model.config, max_cache_len=16))


def compiled(model, case):
    """What the compiled model computes, and how often its graph breaks."""
    found = case(model, torch.compile(model, backend="eager"))
    return found, sum(counters["graph_break"].values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "case", "params"),
    [
        ("llama", static, ContextParams()),
        ("llama", packed, ContextParams(n_swa=4, fused_layers=True)),
        ("mistral", dynamic, ContextParams()),
        ("gpt_oss", padded, ContextParams()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_graph_breaks(family, case, params):
    model = tiny_model(tiny_config(family, num_hidden_layers=1))
    with attach(model, params):
        expected = case(model, model)
        found, breaks = compiled(model, case)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert breaks == 0


@torch.no_grad()
def test_our_caches_are_left_out_of_graphs():
    model = tiny_model(tiny_config("llama", num_hidden_layers=1))
    with attach(model) as attached:
        expected = model(IDS, past_key_values=attached.new_cache()).logits
        run = torch.compile(model, backend="eager")
        found = run(IDS, past_key_values=attached.new_cache()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_follows_what_is_attached():
    """It was compiled before, so its graphs have to notice."""
    model = tiny_model(tiny_config("llama", num_hidden_layers=1))
    run = torch.compile(model, backend="eager")
    plain = run(IDS).logits
    with attach(run, ContextParams(n_swa=4)):
        narrow = run(IDS).logits
        torch.testing.assert_close(narrow, model(IDS).logits)
    assert torch.equal(run(IDS).logits, plain) and not torch.allclose(narrow, plain, atol=1e-3)


def test_biased_masks_are_refused_by_a_graph_too():
    model = tiny_model(tiny_config("llama", num_hidden_layers=1))
    with attach(model), pytest.raises(RuntimeError, match="may hold only 0 and -inf"):
        torch.compile(model, backend="eager")(IDS, attention_mask=torch.randn(2, 1, 12, 12))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.16."),
    reason="transformers 5.16 passes masks into the graph as they are",
)
def test_generate_with_a_static_cache_that_compiles():
    """It makes the mask outside of the graph and passes it in."""
    model = tiny_model(tiny_config("llama"), "sdpa")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    config = CompileConfig(fullgraph=False, dynamic=None, backend="eager")
    config._compile_all_devices = True
    expected = model.generate(IDS, attention_mask=PADDED, **options)
    with attach(model):
        found = model.generate(
            IDS,
            attention_mask=PADDED,
            cache_implementation="static",
            compile_config=config,
            **options,
        )
    assert torch.equal(found, expected)


def test_gradients_under_a_softcap_are_one_graph():
    model = tiny_model(tiny_config("gemma2"), "eager")
    with attach(model):
        expected = model(IDS, labels=IDS, use_cache=False).loss
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(run(IDS, labels=IDS, use_cache=False).loss, expected)
