"""Whole models over keys in host memory: the results of keys on the device.

Without a GPU the keys are staged too, their copies as late as the schedule allows; with one, steps
are captured and copies run on a stream of their own.
"""

import importlib
from functools import partial

import pytest
import torch

import saccade
from saccade.cache import OffloadedCache, StagingBuffers, host_rows
from saccade.hf import captured_steps
from saccade.runtime import ContextParams, DecodeStep
from saccade.runtime.session import load_session, save_session
from tests.support.side_streams import LateSide
from tests.tiny_models import tiny_config, tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = torch.arange(3, 153) % 120 + 3
OFF = {"offload_kqv": False}
TAIL = 8


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    side = {} if request.param == "cuda" else {"side_of": lambda _: LateSide()}
    attaching = importlib.import_module("saccade.hf.attach")
    monkeypatch.setattr(attaching, "StagingBuffers", partial(StagingBuffers, tail=TAIL, **side))
    # With a tail so short, storage moves more often than captures pay for.
    monkeypatch.setattr(captured_steps, "_FREE_CAPTURES", 16)
    monkeypatch.setattr(host_rows, "SMALLEST", 1 << 13)
    monkeypatch.setattr(host_rows, "LARGEST", 1 << 14)
    return request.param


@pytest.fixture(params=["llama", "gemma3"])  # of gemma3 some layers slide, in rings
def model(request, device):
    return tiny_model(tiny_config(request.param)).to(device)


def read(model, params):
    """Logits of a text that is read, stepped, read on and shifted."""
    found = []
    with saccade.Context(model, ContextParams(n_batch=64, **params)) as ctx:
        found.append(ctx.logits(ctx.append(PROMPT)))
        step = DecodeStep(ctx.model, ctx.cache)
        for token in range(5, 5 + 2 * TAIL + 1):
            found.append(step(token).clone())
        ctx.append(PROMPT[:3])
        ctx.shift(4)
        found.append(step(7).clone())
        found.append(ctx.logits(ctx.append([9])))
    return torch.cat(found)


def test_a_context_computes_the_same(model):
    assert torch.allclose(read(model, OFF), read(model, {}), atol=2e-5)


def test_a_session_goes_on_where_it_was(model, tmp_path):
    params = ContextParams(n_batch=64, **OFF)
    with saccade.Context(model, params) as ctx:
        ctx.append(PROMPT)
        ctx.append(PROMPT[:3])
        assert any(isinstance(store, OffloadedCache) and store.rows for store in ctx.cache.stores)
        save_session(tmp_path / "s", ctx)
        expected = [each.token for each in ctx.stream(n_predict=12)]
    with saccade.Context(model, params) as ctx:
        load_session(tmp_path / "s", ctx)
        assert [each.token for each in ctx.stream(n_predict=12)] == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"padded": True}], ids=str)
def test_generate_writes_the_same(model, device, options):
    rows = torch.stack((PROMPT[:40], PROMPT[9:49])).to(device)
    mask = torch.ones_like(rows)
    if options.pop("padded", False):
        mask[0, :5] = 0
    options |= {"attention_mask": mask, "max_new_tokens": 2 * TAIL, "do_sample": False}
    found = []
    for params in (OFF, {}):
        with saccade.attach(model, ContextParams(**params)):
            found.append(model.generate(rows, **options).tolist())
    assert found[0] == found[1]


@pytest.mark.gpu
def test_steps_over_host_memory_are_captured():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model = tiny_model(tiny_config("llama")).to("cuda")
    with saccade.Context(model, ContextParams(n_batch=512, **OFF)) as ctx:
        text = torch.cat([PROMPT] * 3)
        ctx.append(text)
        step = DecodeStep(ctx.model, ctx.cache)
        for _ in range(300):  # the newest tokens move to the host once
            logits = step(7)
        assert step.captures == 2
        with saccade.Context(model, ContextParams(n_batch=512, n_ctx=1024)) as plain:
            plain.append(torch.cat((text, torch.full((299,), 7))))
            expected = plain.logits(plain.append([7]))
    assert torch.allclose(logits, expected, atol=1e-3)
