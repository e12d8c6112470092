"""What a command says of options that are given and do something else than one might expect."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from saccade.cli.context_length import reaching
from saccade.cli.notes import Notes
from saccade.hf.facts import facts_of
from saccade.runtime import ContextParams
from tests.tiny_models import COMMON

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256,
}  # fmt: skip


def said_of(params, tokens, rope=None, typed=None):
    config = LlamaConfig(**COMMON)
    if rope is not None:
        config.rope_parameters = rope
    facts = facts_of(config, name="tiny", n_ctx_train=None, dtype=torch.float32)
    notes = Notes(quiet=True, typed=typed or {})
    assert reaching(params, facts, tokens, notes).rope_freq_scale == params.rope_freq_scale
    return " ".join(notes.said)


@pytest.mark.parametrize(
    ("rope", "tokens", "parts"),
    [
        (None, 100, ("stretches positions linearly, as --rope-scaling linear", "inside the 512")),
        (None, 700, ("stretches positions linearly",)),
        (YARN, 100, ("replaces the factor of the model's own scaling", "inside the 512")),
    ],
)
def test_a_factor_without_a_kind_of_scaling_says_what_it_does(rope, tokens, parts):
    said = said_of(ContextParams(rope_freq_scale=0.25), tokens, rope, {"rope_scale": 4.0})
    assert said.startswith("--rope-scale 4 alone ") and all(part in said for part in parts)
    assert ("it can only cost" in said) == (tokens < 512)


@pytest.mark.parametrize("kind", ["yarn", "none", "linear"])
def test_a_kind_of_scaling_that_was_chosen_needs_no_note(kind):
    scale = None if kind == "none" else 0.25
    assert said_of(ContextParams(rope_scaling_type=kind, rope_freq_scale=scale), 100) == ""
