"""Hidden states and logits by the model's own forward, cut behind its decoder."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from saccade.core import Unsupported
from saccade.hf import Context, HFModel
from saccade.hf.split_forward import cuttable, hidden_states, logits_of
from scripts.family_configs import tiny_config, tiny_model
from tests.hf.model_state import different, state_of

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = (
    *("hyperclovax", "granite", "cohere", "gemma2", "bert", "roberta", "electra", "gpt2"),
    *("modernbert-decoder", "bart", "opt", "phi", "mllama", "whisper", "ctrl", "falcon_h1"),
)


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_both_halves_are_the_forward(name, ids):
    model = tiny_model(name, tiny_config(name))
    whole, kept = model(ids).logits, state_of(model)
    hidden = hidden_states(model, input_ids=ids)
    assert different(kept, state_of(model)) == []
    assert torch.equal(logits_of(model, hidden), whole)
    some = logits_of(model, hidden[:, -3:])
    torch.testing.assert_close(some, whole[:, -3:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_one_hidden_state_in_any_shape(ids):
    model = tiny_model("llama", tiny_config("llama"))
    adapter = HFModel(model)
    hidden = hidden_states(model, input_ids=ids)
    for part in (hidden, hidden[0], hidden[0, -1]):
        assert adapter.logits(part).shape == (*part.shape[:-1], 128)
    torch.testing.assert_close(adapter.logits(hidden[1, 3]), model(ids).logits[1, 3])


def test_several_users_leave_in_any_order(ids):
    model = tiny_model("llama", tiny_config("llama"))
    kept = state_of(model)
    first, second = ExitStack(), ExitStack()
    first.enter_context(cuttable(model))
    second.enter_context(cuttable(model))
    first.close()
    assert model(ids).logits.isfinite().all()  # a call of others is not cut
    assert hidden_states(model, input_ids=ids).shape == (2, 12, 64)
    second.close()
    assert different(kept, state_of(model)) == []


def test_an_error_inside_leaves_the_model_as_it_was(ids):
    model = tiny_model("llama", tiny_config("llama"))
    kept = state_of(model)
    with pytest.raises((RuntimeError, IndexError)):
        hidden_states(model, input_ids=ids + 1000)
    assert different(kept, state_of(model)) == []


def test_a_forward_that_calls_no_decoder_is_refused(ids, monkeypatch):
    model = tiny_model("llama", tiny_config("llama"))
    monkeypatch.setattr(model, "forward", lambda **inputs: None)
    with pytest.raises(Unsupported, match="does not call the decoder that transformers names"):
        hidden_states(model, input_ids=ids)
    with pytest.raises(Unsupported, match="does not call the decoder"):
        logits_of(model, torch.zeros(1, 1, 64))


def test_a_model_without_logits_is_refused(ids):
    base = tiny_model("llama", tiny_config("llama")).model
    assert isinstance(base, nn.Module)
    with pytest.raises(Unsupported), Context(base) as ctx:
        ctx.logits(ctx.append(ids[0]))
