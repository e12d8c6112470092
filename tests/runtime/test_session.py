"""Sessions: a restored context continues exactly, and what does not fit is refused."""

import json
import os
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saccade
from saccade.core import BadInput
from saccade.runtime import ContextParams, Sampler, session_file
from saccade.runtime.session import load_session, save_session
from tests.tiny_models import tiny_config, tiny_model

TOKENS = torch.arange(3, 103) % 120 + 3
MORE = torch.arange(7, 30)

KINDS = {
    "dense": ("llama", {}),
    "dense in bf16": ("llama", {"type_k": "bf16", "type_v": "bf16"}),
    "ring": ("llama", {"n_swa": 16, "n_sinks": 2}),
    "offloaded": ("llama", {"offload_kqv": False}),
    "paged": ("llama", {"page_size": 8}),
    "int8": ("llama", {"type_k": "int8", "type_v": "int8"}),
    "int4": ("llama", {"type_k": "int4", "type_v": "int4"}),
    "fp8": ("llama", {"type_k": "fp8", "type_v": "fp8"}),
    "compressed": ("llama", {"kv_policy": "snapkv", "kv_budget": 70}),
    "ragged": ("llama", {"kv_policy": "ada_snapkv", "kv_budget": 70}),
    "compressed int4": (
        "llama",
        {"kv_policy": "snapkv", "kv_budget": 40, "type_k": "int4", "type_v": "int4"},
    ),
    "shifted": ("llama", {"n_ctx": 110, "n_keep": 4}),
    "yarn": ("llama", {"rope_scaling_type": "yarn", "n_ctx": 1024}),
    "hybrid": ("gemma3", {}),
    "hybrid shifted": ("gemma3", {"n_ctx": 110, "n_keep": 4}),
    "hybrid with a window": ("gpt_oss", {"n_swa": 12, "n_sinks": 3}),
}
SAMPLERS = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 40, "seed": 3}}


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, tiny_model(tiny_config(name)))


def stream(ctx, sampler, n, prompt=()):
    return [item.token for item in ctx.stream(prompt, n_predict=n, sampler=sampler)]


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [(kind, list(SAMPLERS)[at % len(SAMPLERS)]) for at, kind in enumerate(KINDS)],
)
def test_a_restored_context_continues_exactly(models, tmp_path, kind, sampling):
    """Continue without a prompt, then with another one: the same tokens and the same memory."""
    name, options = KINDS[kind]
    model, params = models(name), ContextParams(**options)
    sampler = Sampler(**SAMPLERS[sampling])
    with saccade.Context(model, params) as ctx:
        stream(ctx, sampler, 12, TOKENS[:90])
        save_session(tmp_path / "s", ctx, sampler)
        size, seen = ctx.cache_bytes, ctx.seen
        expected = stream(ctx, sampler, 15) + stream(ctx, sampler, 9, MORE)
    with saccade.Context(model, params) as ctx:
        sampler = load_session(tmp_path / "s", ctx)
        assert ctx.cache_bytes == size and ctx.seen == seen
        assert stream(ctx, sampler, 15) + stream(ctx, sampler, 9, MORE) == expected


@pytest.mark.parametrize("saved_so", [True, False])
def test_storage_in_the_models_own_dtype_is_the_same_session(
    models, tmp_path, monkeypatch, saved_so
):
    """Also in files from before, which name the dtype in their options and in every cache."""
    model, own = models("llama"), ContextParams(type_k="f32", type_v="f32")
    first, second = (own, None) if saved_so else (None, own)
    with monkeypatch.context() as patch:
        if saved_so:
            for name in ("runtime.context", "hf.model", "hf.attach"):
                module = import_module(f"saccade.{name}")
                patch.setattr(module, "without_own_dtype", lambda params, dtype: params)
        with saccade.Context(model, first) as ctx:
            stream(ctx, Sampler(), 12, TOKENS)
            save_session(tmp_path / "s", ctx)
            expected = stream(ctx, Sampler(), 5)
    assert session_file.SessionFile(tmp_path / "s").record["params"]["type_k"] == (
        "f32" if saved_so else None
    )
    with saccade.Context(model, second) as ctx:
        assert stream(ctx, load_session(tmp_path / "s", ctx), 5) == expected


@pytest.mark.parametrize("shown", [1, 4])
def test_an_abandoned_stream_continues_after_the_last_token_yielded(models, tmp_path, shown):
    model = models("llama")
    with saccade.Context(model) as ctx:
        expected = stream(ctx, Sampler(), 10, TOKENS)
    with saccade.Context(model) as ctx:
        generated = ctx.stream(TOKENS, n_predict=10)
        first = [next(generated).token for _ in range(shown)]
        generated.close()
        save_session(tmp_path / "s", ctx)
    with saccade.Context(model) as ctx:
        sampler = load_session(tmp_path / "s", ctx)
        assert first + stream(ctx, sampler, 10 - shown) == expected


def test_a_session_can_replace_another(models, tmp_path):
    model = models("llama")
    with saccade.Context(model) as ctx:
        save_session(tmp_path / "empty", ctx)
        stream(ctx, Sampler(), 5, TOKENS)
        save_session(tmp_path / "s", ctx)
        expected = stream(ctx, Sampler(), 5)
        load_session(tmp_path / "empty", ctx)
        assert ctx.seen == 0 and ctx.tokens == [] and ctx.next_token is None
        stream(ctx, Sampler(), 5, MORE)
        load_session(tmp_path / "s", ctx)
        assert stream(ctx, Sampler(), 5) == expected


@pytest.fixture
def saved(models, tmp_path):
    path = tmp_path / "s"
    with saccade.Context(models("llama")) as ctx:
        stream(ctx, Sampler(), 3, TOKENS)
        save_session(path, ctx)
    return path


def refusal(path, model, params=None):
    """The error text; the context is empty or as it was, and still works."""
    with saccade.Context(model, params) as ctx:
        before = ctx.seen
        with pytest.raises(BadInput) as caught:
            load_session(path, ctx)
        assert ctx.seen == before == 0
        assert len(stream(ctx, Sampler(), 2, TOKENS[:5])) == 2
    return str(caught.value)


class TestRefusals:
    def test_truncated_anywhere(self, models, saved):
        whole = saved.read_bytes()
        for cut in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            saved.write_bytes(whole[:cut])
            assert "it is truncated or not a session file" in refusal(saved, models("llama"))

    def test_foreign(self, models, saved):
        saved.write_bytes(b"GGUF" + bytes(1000))
        assert "not a complete session" in refusal(saved, models("llama"))
        save_file({"x": torch.ones(3)}, saved)
        assert "but no session of saccade" in refusal(saved, models("llama"))

    def test_every_flipped_byte_is_noticed(self, models, saved):
        whole = saved.read_bytes()
        for at in torch.linspace(0, len(whole) - 1, 60).long().tolist():
            damaged = bytearray(whole)
            damaged[at] ^= 1
            saved.write_bytes(bytes(damaged))
            said = refusal(saved, models("llama"))
            assert "not a complete session" in said or "was changed after it was saved" in said

    def test_newer(self, models, saved, monkeypatch):
        monkeypatch.setattr(session_file, "VERSION", 7)
        with saccade.Context(models("llama")) as ctx:
            save_session(saved, ctx)
        monkeypatch.undo()
        said = refusal(saved, models("llama"))
        assert "newer saccade (session version 7, this one reads version 3)" in said
        assert "Upgrade saccade to continue it" in said

    def test_older(self, models, saved, monkeypatch):
        """Version 2 did not say which config the model had."""
        monkeypatch.setattr(session_file, "VERSION", 2)
        with saccade.Context(models("llama")) as ctx:
            save_session(saved, ctx)
        monkeypatch.undo()
        said = refusal(saved, models("llama"))
        assert "older saccade (session version 2, this one reads version 3)" in said
        assert "read the prompt again" in said

    def test_another_model(self, models, saved):
        other = tiny_model(tiny_config("llama"), seed=1)
        assert "another model: its weights is" in refusal(saved, other)
        smaller = tiny_model(tiny_config("llama", num_hidden_layers=2))
        assert "its num_layers is 4, this model has 2" in refusal(saved, smaller)

    def test_other_options(self, models, saved):
        said = refusal(saved, models("llama"), ContextParams(n_swa=8))
        assert "was saved with n_swa=None, this context has n_swa=8" in said
        said = refusal(saved, models("llama"), ContextParams(type_k="int8", type_v="int8"))
        assert "type_k=None, this context has type_k='int8'" in said
        said = refusal(saved, models("llama"), ContextParams(rope_freq_base=5e5))
        assert "rope_freq_base=None, this context has rope_freq_base=500000.0" in said

    def test_contents_that_contradict_each_other(self, models, saved):
        """With checksums that fit, so written by another program."""
        file = session_file.SessionFile(saved)
        file.record["layers"][2]["progress"]["slots"] = 50
        tensors = load_file(saved)
        session_file.write(saved, tensors, file.record)
        assert "contradicts itself" in refusal(saved, models("llama"))
        del file.record["layers"]
        session_file.write(saved, tensors, file.record)
        assert "not written by saccade" in refusal(saved, models("llama"))

    def test_a_missing_file_is_a_file_not_found_error(self, models, tmp_path):
        with saccade.Context(models("llama")) as ctx, pytest.raises(FileNotFoundError):
            load_session(tmp_path / "none", ctx)


def test_options_that_keys_do_not_depend_on_may_change(models, saved):
    params = ContextParams(n_batch=7, flash_attn="disabled", n_ctx=200, n_keep=4)
    with saccade.Context(models("llama"), params) as ctx:
        load_session(saved, ctx)
        assert ctx.seen == 103


def test_an_interrupted_step_is_not_saved(models, saved):
    before = saved.read_bytes()
    with saccade.Context(models("llama")) as ctx:
        stream(ctx, Sampler(), 3, TOKENS)
        ctx.cache.stores[0].truncate(50)
        with pytest.raises(BadInput, match="interrupted in the middle of a step"):
            save_session(saved, ctx)
    assert saved.read_bytes() == before


def test_a_full_disk_leaves_the_old_session(models, saved, monkeypatch):
    before = saved.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with saccade.Context(models("llama")) as ctx, pytest.raises(OSError, match="No space left"):
        save_session(saved, ctx)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_the_file_is_ordinary_safetensors_without_pickle(saved):
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["saccade.session"])["layers"][0]["kind"] == "dense"
    assert load_file(saved)["tokens"].tolist()[:100] == TOKENS.tolist()
    assert saved.stat().st_mode & 0o077 == 0


def test_kill_9_loses_no_session(tmp_path):
    """The benchmark with few kills; see benchmarks/kill_sessions.py."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "kill_sessions.py", "--kills", "12",
         "--cuts", "12", "--folder", tmp_path],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["sessions_lost"] == 0 and figures["saves"] > 0
    assert figures["of_these_while_writing_at_a_byte"] == figures["kills_at_a_byte"] == 12
