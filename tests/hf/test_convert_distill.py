"""Training converted layers against those they replace."""

from __future__ import annotations

import pytest
import torch

from saccade.hf import converted_heads
from saccade.hf.convert_distill import distill, rows_needed
from tests.hf.model_state import different, state_of
from tests.tiny_models import tiny_config, tiny_model


@pytest.fixture
def rows():
    return torch.randint(3, 128, (17, 64), generator=torch.Generator().manual_seed(1))


def equal_heads(family: str = "llama"):
    """A model of even attention whose KV heads are equal, so that one can do what they do."""
    model = tiny_model(tiny_config(family))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight /= 12
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for part in linear.parameters():
                    part[16:] = part[:16]
    return model


@torch.no_grad()
def disturb(model) -> None:
    random = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight
        weight += weight.std() * torch.randn(weight.shape, generator=random)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_training_brings_the_model_nearer_and_is_undone(ids, rows, family):
    model = equal_heads(family)
    kept, plain = state_of(model), logits(model, ids)
    weights = [part.clone() for part in model.parameters()]
    with converted_heads(model, 1) as done:
        disturb(model)
        merged = logits(model, ids)
        trained = distill(model, done.swaps, rows, steps=48, rate=0.05)
        learned = logits(model, ids)
    assert (trained.layers, trained.complete) == (4, True)
    assert trained.after < 0.7 * trained.before
    assert (learned - plain).norm() < (merged - plain).norm()
    assert different(kept, state_of(model)) == []
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_seed_fixes_the_result(rows):
    model, found = tiny_model(tiny_config("llama")), []
    for seed in (0, 0, 1):
        with converted_heads(model, 1) as done:
            distill(model, done.swaps, rows, steps=3, seed=seed)
            found.append(model.model.layers[3].self_attn.k_proj.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_an_interrupt_keeps_the_layers_that_are_done(ids, rows):
    llama = equal_heads()
    kept = state_of(llama)

    def stop(layer: int, layers: int, error: float) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with converted_heads(llama, 1) as done:
        disturb(llama)
        before = [layer.self_attn.v_proj.weight.clone() for layer in llama.model.layers]
        trained = distill(llama, done.swaps, rows, steps=48, rate=0.05, on_progress=stop)
        after = [layer.self_attn.v_proj.weight for layer in llama.model.layers]
        assert (trained.layers, trained.complete) == (2, False)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [False, False, True, True]
        assert logits(llama, ids).isfinite().all()
    assert different(kept, state_of(llama)) == []


def test_what_makes_a_layer_worse_is_not_kept(rows, llama):
    with converted_heads(llama, 1) as done:
        before = [layer.self_attn.v_proj.weight.clone() for layer in llama.model.layers]
        trained = distill(llama, done.swaps, rows, steps=3, rate=1e4)
        after = [layer.self_attn.v_proj.weight for layer in llama.model.layers]
    assert trained.after == trained.before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_are_used_a_few_times_and_one_is_kept_to_judge_by():
    assert [rows_needed(steps) for steps in (1, 4, 5, 32)] == [2, 3, 4, 17]


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits
