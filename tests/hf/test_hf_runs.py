"""Runs of one model: each computes as if it were alone, whatever others do with the model."""

from __future__ import annotations

import copy
import threading
from itertools import permutations

import pytest
import torch

import saccade
from saccade.hf import HFModel, attach
from saccade.runtime import Sampler
from saccade.runtime.params import ContextParams
from saccade.sparse import Strided
from tests.tiny_models import tiny_config, tiny_model

PARAMS = {
    "plain": ContextParams(),
    "window": ContextParams(n_swa=8, n_sinks=2),
    "int8": ContextParams(type_k="int8", type_v="int8"),
    "yarn": ContextParams(n_ctx=2048, rope_scaling_type="yarn"),
    "linear": ContextParams(rope_freq_scale=0.5),
    "dynamic": ContextParams(rope_scaling_type="dynamic", n_ctx=1024),
    "reference": ContextParams(flash_attn="disabled"),
    "sparse": ContextParams(sparse=Strided(block=4, window_blocks=1, stride=0)),
    "fused": ContextParams(fused_layers=True, n_swa=12),
}
TOKENS = {
    name: torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(PARAMS)
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"))


def read(ctx, tokens):
    return ctx.logits(ctx.append(tokens, wanted=len(tokens)))


@pytest.fixture(scope="module")
def alone(model):
    """Logits of each set of options when no other run is open, in two chunks."""
    found = {}
    for name, params in PARAMS.items():
        with saccade.Context(model, params) as ctx:
            found[name] = [read(ctx, part) for part in TOKENS[name].split(25)]
    return found


@pytest.mark.parametrize("pair", list(permutations(PARAMS, 2)), ids="-".join)
@pytest.mark.parametrize("older_first", [True, False])
def test_interleaved_contexts(model, alone, pair, older_first):
    contexts = {name: saccade.Context(model, PARAMS[name]) for name in pair}
    for name, ctx in contexts.items():
        assert torch.equal(read(ctx, TOKENS[name][:25]), alone[name][0])
    first, second = pair if older_first else pair[::-1]
    contexts[first].close()
    assert torch.equal(read(contexts[second], TOKENS[second][25:]), alone[second][1])
    contexts[second].close()
    assert model.config._attn_implementation == "eager"


def test_all_at_once(model, alone):
    contexts = {name: saccade.Context(model, params) for name, params in PARAMS.items()}
    for part in (0, 1):
        for name, ctx in contexts.items():
            tokens = TOKENS[name].split(25)[part]
            assert torch.equal(read(ctx, tokens), alone[name][part]), name
    for name in sorted(contexts):
        contexts[name].close()


def test_contexts_in_threads(model, alone):
    found = {}

    def run(name):
        with saccade.Context(model, PARAMS[name]) as ctx:
            found[name] = [read(ctx, part) for part in TOKENS[name].split(25)]

    threads = [threading.Thread(target=run, args=(name,)) for name in PARAMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in PARAMS:
        assert all(map(torch.equal, found[name], alone[name])), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_sessions_and_shifts_know_their_own_positions(model, tmp_path):
    """What is asked of the model without a cache (rotary rule, key shift) is of the run too."""
    expected = {}
    for name in ("plain", "yarn"):
        with saccade.Context(model, PARAMS[name]) as ctx:
            ctx.append(TOKENS[name])
            ctx.shift(4)
            expected[name] = ctx.model.identity(), read(ctx, [5, 6])
    assert expected["plain"][0] != expected["yarn"][0]
    with saccade.Context(model, PARAMS["plain"]) as a, saccade.Context(model, PARAMS["yarn"]) as b:
        for name, ctx in (("plain", a), ("yarn", b)):
            ctx.append(TOKENS[name])
            ctx.shift(4)
            assert ctx.model.identity() == expected[name][0]
            assert torch.equal(read(ctx, [5, 6]), expected[name][1])


@torch.no_grad()
def test_a_context_serves_its_own_calls_alone(model, ids):
    """Other calls of the model, and attach, are as they are without it."""
    plain = model(ids).logits
    with attach(model, PARAMS["window"]):
        narrow = model(ids).logits
    with saccade.Context(model, PARAMS["yarn"]):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        with attach(model, PARAMS["window"]):
            assert torch.equal(model(ids).logits, narrow)


@torch.no_grad()
def test_attached_in_any_order(model, ids):
    """The newest that is still attached counts."""
    expected = {}
    for name in ("window", "yarn"):
        with attach(model, PARAMS[name]):
            expected[name] = model(ids).logits
    older, newer = attach(model, PARAMS["window"]), attach(model, PARAMS["yarn"])
    older.__enter__()
    newer.__enter__()
    assert torch.equal(model(ids).logits, expected["yarn"])
    older.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, expected["yarn"])
    newer.__exit__(None, None, None)
    assert not torch.allclose(model(ids).logits, expected["yarn"], atol=1e-3)


@torch.no_grad()
def test_a_cache_brings_the_options_it_was_made_under(model, ids):
    with attach(model, PARAMS["window"]) as outer:
        narrow = model(ids).logits
        cache = outer.new_cache()
        with attach(model):
            found = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, narrow, atol=1e-5, rtol=1e-5)


def test_one_adapter_for_several_contexts(model, alone):
    adapter = HFModel(model)
    with (
        saccade.Context(adapter, PARAMS["yarn"]) as yarn,
        saccade.Context(adapter, PARAMS["window"]) as window,
    ):
        assert torch.equal(read(yarn, TOKENS["yarn"][:25]), alone["yarn"][0])
        assert torch.equal(read(window, TOKENS["window"][:25]), alone["window"][0])
        assert torch.equal(read(yarn, TOKENS["yarn"][25:]), alone["yarn"][1])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_modules_with_state_are_not_shared(kind):
    """transformers keeps the longest sequence seen in the module: each context has its own."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        parameters |= {
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        }
    config = tiny_config("llama", rope_parameters=parameters, max_position_embeddings=64)
    short, long = torch.arange(3, 73), torch.arange(3, 119)
    model = tiny_model(config)
    with saccade.Context(model, ContextParams(n_ctx=256)) as ctx:
        expected = read(ctx, short)
    model = tiny_model(copy.deepcopy(config))
    before = dict(model.model.rotary_emb.named_buffers())
    with saccade.Context(model, ContextParams(n_ctx=256)) as a:
        read(a, long)
        with saccade.Context(model, ContextParams(n_ctx=256)) as b:
            assert torch.equal(read(b, short), expected)
    after = dict(model.model.rotary_emb.named_buffers())
    assert all(before[name] is after[name] for name in before)


def test_streams_of_two_contexts(model):
    """Token by token, alternately."""
    names = ("window", "yarn")
    expected = {}
    for name in names:
        with saccade.Context(model, PARAMS[name]) as ctx:
            expected[name] = [t.token for t in ctx.stream(TOKENS[name], n_predict=8)]
    contexts = {name: saccade.Context(model, PARAMS[name]) for name in names}
    streams = [
        contexts[name].stream(TOKENS[name], n_predict=8, sampler=Sampler()) for name in names
    ]
    found = [[token.token for token in both] for both in zip(*streams, strict=True)]
    assert found == [list(both) for both in zip(*expected.values(), strict=True)]
    for name in names:
        contexts[name].close()
