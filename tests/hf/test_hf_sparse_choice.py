"""choose_sparse on a tiny model: what it refuses, and that a choice runs."""

import pytest
import torch

from saccade.core import Unsupported
from saccade.hf import HFModel
from saccade.hf.sparse_choice import choose_sparse
from saccade.runtime import ContextParams
from saccade.sparse import BlockTopK
from tests.tiny_models import tiny_config, tiny_model

TEXT = torch.arange(1100) % 50 + 3


def test_it_measures_at_doubling_lengths_and_says_why():
    model = HFModel(tiny_model(tiny_config("llama")), n_ctx_train=4096)
    choice = choose_sparse(model, TEXT, recall=0.5)
    assert {keys for _, _, keys in choice.found} == {1024}
    assert {phase for _, phase, _ in choice.found} == {"prefill", "decode"}
    assert all(0 < row.mean_recall <= 1 and row.ratio > 0 for row in choice.found.values())
    assert choice.why.startswith("dense") == (choice.pattern is None)


def test_short_texts_are_read_densely():
    choice = choose_sparse(HFModel(tiny_model(tiny_config("llama"))), TEXT[:900])
    assert choice.pattern is None
    assert "fewer than 1,024 tokens" in choice.why


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"recall": 0}, ValueError, r"in \(0, 1\], got 0"),
        ({"recall": True}, ValueError, r"in \(0, 1\], got True"),
        ({"params": ContextParams(sparse=BlockTopK())}, ValueError, "is what is chosen here"),
        ({"params": ContextParams(n_swa=64)}, Unsupported, "n_swa or kv_policy removes some"),
    ],
)
def test_errors(given, error, says):
    with pytest.raises(error, match=says):
        choose_sparse(HFModel(tiny_model(tiny_config("llama"))), **({"tokens": TEXT} | given))


def test_a_model_that_scales_scores_otherwise_is_refused():
    with pytest.raises(Unsupported, match="scales or caps otherwise"):
        choose_sparse(HFModel(tiny_model(tiny_config("gemma2"))), TEXT)
