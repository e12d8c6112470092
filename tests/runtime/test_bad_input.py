"""Every door of a context refuses what it cannot use with one sentence, before anything is read."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config

import saccade
from saccade.core import BadInput, Unsupported
from saccade.runtime import ContextParams
from tests.tiny_models import tiny_config, tiny_model

PROMPT = list(range(3, 13))
NO_IDS = {
    "floats": [5.5, 3.0],
    "a float tensor": torch.tensor([5.0, 3.0]),
    "two dimensions": torch.tensor([[5, 3]]),
    "lists": [[5, 3]],
    "ragged lists": [[5], [3, 4]],
    "text": "hello",
    "texts": ["hello"],
    "bytes": b"hello",
    "bools": [True, False],
    "a bool among ints": [5, True],
    "a bool tensor": torch.tensor([True]),
    "negative": [5, -1],
    "beyond the vocabulary": [5, 128],
    "huge": [5, 10**30],
    "a number": 5,
    "a complex tensor": torch.ones(2, dtype=torch.complex64),
    "a tensor without memory": torch.ones(2, dtype=torch.int64, device="meta"),
    "numpy floats": np.ones(3),
    "None inside": [5, None],
    "a dict": {5: 3},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama", num_hidden_layers=2))


@pytest.mark.parametrize("kind", NO_IDS)
@pytest.mark.parametrize("door", ["append", "stream", "reuse"])
def test_what_is_no_token_id_is_refused(model, kind, door):
    with saccade.Context(model) as ctx:
        ctx.append(PROMPT)
        with pytest.raises(BadInput) as caught:
            getattr(ctx, door)(NO_IDS[kind])
        assert str(caught.value).endswith(".") and ctx.tokens == PROMPT


@pytest.mark.parametrize(
    "ids", [PROMPT, tuple(PROMPT), range(3, 13), np.array(PROMPT), torch.tensor(PROMPT).int()]
)
def test_ids_of_any_integer_kind_are_read(model, ids):
    with saccade.Context(model) as ctx:
        ctx.append(ids)
        assert ctx.tokens == PROMPT


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ctx: ctx.append(PROMPT, wanted=0), "wanted must be at least 1, got 0"),
        (lambda ctx: ctx.append(PROMPT, wanted=1.5), "wanted must be a whole number, got 1.5"),
        (lambda ctx: ctx.stream(PROMPT, n_predict=-1), "n_predict must be at least 0, got -1"),
        (lambda ctx: ctx.stream(PROMPT, n_predict=True), "n_predict must be a whole number"),
        (lambda ctx: ctx.stream(PROMPT, stop="abc"), "expected stop as token ids"),
        (lambda ctx: ctx.stream(PROMPT, stop=5), "expected stop as token ids"),
        (lambda ctx: ctx.shift(-1), "n_keep must be at least 0, got -1"),
        (lambda ctx: ctx.shift("4"), "n_keep must be a whole number, got '4'"),
        (lambda ctx: list(ctx.stream()), "nothing to continue from"),
        (lambda ctx: ctx.append([]), "the prompt is empty"),
    ],
)
def test_counts_that_make_no_sense(model, call, text):
    with saccade.Context(model) as ctx:
        with pytest.raises(BadInput, match=text):
            call(ctx)
        assert ctx.tokens == []


@pytest.mark.parametrize("n_keep", [39, 40, 100])
def test_n_keep_that_leaves_nothing_to_remove_is_refused_at_once(model, n_keep):
    with pytest.raises(BadInput, match=f"n_keep={n_keep} leaves nothing to remove"):
        saccade.Context(model, ContextParams(n_ctx=40, n_keep=n_keep))


def test_positions_that_cannot_be_shifted_are_refused_at_once():
    learned = tiny_model(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2), "eager")
    with pytest.raises(Unsupported, match="n_keep"):
        saccade.Context(learned, ContextParams(n_keep=4))
    assert learned.config._attn_implementation != "saccade"


@pytest.mark.parametrize("options", [{"n_swa": 10**12}, {"page_size": 10**12}])
def test_a_window_or_a_page_larger_than_memory(model, options):
    with pytest.raises(BadInput, match="of memory are free"):
        saccade.Context(model, ContextParams(**options))


def test_other_things_than_models_and_params(model):
    for wrong in ({"n_ctx": 5}, "fast", 5):
        with pytest.raises(TypeError, match="expected ContextParams or None, got"):
            saccade.Context(model, wrong)
        with pytest.raises(TypeError, match="expected ContextParams"), saccade.attach(model, wrong):
            pass
    with pytest.raises(TypeError, match="expected a loaded model"):
        saccade.Context("smollm2")
    with pytest.raises(BadInput, match="reserve must be"):
        saccade.Context(model, reserve=-1)
    with pytest.raises(ValueError, match="yarn_orig_ctx=64 changes nothing"):
        saccade.Context(model, ContextParams(yarn_orig_ctx=64))


def test_a_closed_context_says_so(model):
    with saccade.Context(model) as ctx:
        ctx.append(PROMPT)
    for call in (lambda: ctx.append([5]), lambda: list(ctx.stream([5])), lambda: ctx.reuse([5])):
        with pytest.raises(BadInput, match="this context is closed"):
            call()
    assert ctx.tokens == PROMPT
