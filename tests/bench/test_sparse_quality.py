"""The density that benchmarks.sparse_quality counts, pair by pair, and its rows on a tiny model."""

import torch

from benchmarks import sparse_quality
from benchmarks.sparse_quality import Counted, rows_of
from saccade.core import DenseKV
from saccade.hf import HFModel
from saccade.sparse import BlockTopK, TriangleMix
from tests.tiny_models import tiny_config, tiny_model


def test_the_density_is_that_of_causal_pairs():
    """Of two layers, the first of which is dense, in a chunk that begins within a block."""
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 61, 16)
    view = DenseKV(k, k)
    pattern = TriangleMix(block=16, window_blocks=1, dense_rows=0, dense_layers=1)
    counted = Counted(pattern, 2)
    counted.select(q, view, 21)
    blocks = counted.select(q, view, 21)
    seen = torch.arange(61) <= torch.arange(21, 61)[:, None]
    chosen = seen & blocks.visible(torch.arange(40), torch.arange(61))[0, 0]
    assert counted.pairs == 2 * seen.sum() and counted.read == seen.sum() + chosen.sum()
    assert 0.5 < counted.read / counted.pairs < 0.9


def test_a_row_of_a_tiny_model(monkeypatch):
    monkeypatch.setattr(sparse_quality, "CHUNK", 64)
    monkeypatch.setattr(sparse_quality, "SCORED", 128)
    monkeypatch.setattr(sparse_quality, "PATTERNS", (BlockTopK(top=99), BlockTopK(block=8, top=0)))
    model = HFModel(tiny_model(tiny_config("llama")))
    whole, part = rows_of(model, torch.arange(192) % 90 + 3, "")
    assert whole["density"] == 1 and whole["same_top"] == 1 and abs(whole["kl"]) < 1e-6
    assert part["density"] < 0.6 and part["kl"] > 1e-6
