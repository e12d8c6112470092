"""The list of transformers classes that fused layers may replace, against the installed version."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from saccade.hf import allowlist
from saccade.hf.allowlist import is_rotary_function, kind_of
from saccade.hf.deferred_rope import deferring_forward
from saccade.hf.fused_layers import fused_forwards
from tests.tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize("kind", allowlist.KINDS)
def test_the_list_is_that_of_the_installed_version(kind):
    assert tuple(allowlist.read_entries()) == allowlist.KINDS
    for name in allowlist.read_entries()[kind]:
        module, _, own = name.rpartition(".")
        listed = getattr(importlib.import_module(module), own)
        if kind == "rotary_function":
            assert is_rotary_function(listed), name
        else:
            assert kind_of(listed) == kind, name


def test_the_script_finds_nothing_new(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "scripts" / "read_transformers_classes.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", [path.name, "--check"])
    assert script.main() == 0 and capsys.readouterr().out == "nothing new\n"


def test_a_class_that_clamps_is_not_known():
    """On examples with moderate numbers its outputs equal those of the original."""

    class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states).clamp(-1e4, 1e4)

    model = tiny_model(tiny_config("llama"))
    model.model.norm = own = LlamaRMSNorm(64)
    assert kind_of(LlamaRMSNorm) is None
    found = dict(fused_forwards(model, lambda: True))
    assert own not in found and model.model.layers[0].input_layernorm in found


def test_a_patched_class_is_not_known(monkeypatch):
    original = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        return original(self, x).clamp(-1e4, 1e4)

    assert kind_of(modeling_llama.LlamaMLP) == "gated_mlp"
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert kind_of(modeling_llama.LlamaMLP) is None


def test_another_source_is_not_known(monkeypatch):
    listed = dict(allowlist._entries())
    listed[allowlist._qualified(modeling_llama.LlamaMLP)] = ("gated_mlp", ("another hash",))
    monkeypatch.setattr(allowlist, "_entries", lambda: listed)
    allowlist._checked.cache_clear()
    assert kind_of(modeling_llama.LlamaMLP) is None
    allowlist._checked.cache_clear()


@pytest.mark.parametrize("thing", [nn.Linear, nn.RMSNorm, torch.relu, object, None])
def test_what_has_no_source_or_is_of_others(thing):
    assert not is_rotary_function(thing)
    assert not isinstance(thing, type) or kind_of(thing) is None


def test_a_rotary_function_of_others_is_called_as_it_is(monkeypatch):
    """Libraries of kernels put their own function into transformers' module."""
    attention = tiny_model(tiny_config("llama")).model.layers[0].self_attn
    assert deferring_forward(attention) is not None

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert deferring_forward(attention) is None


def test_hashes_ignore_indentation_and_trailing_spaces():
    assert allowlist.source_hash("  a = 1  \n  b = 2\n") == allowlist.source_hash("a = 1\nb = 2")
    assert allowlist.source_hash("a = 1") != allowlist.source_hash("a = 2")
