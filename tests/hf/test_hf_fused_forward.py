"""Steps of `generate()` under `attach` on a CPU equal the model's own; other calls are its own."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.hf.fused_decoder import FusedDecoder
from saccade.ops.attention.cpu.binding import BUILT
from saccade.runtime import ContextParams
from tests.hf.test_hf_fused_decoder import CACHES, FAMILIES, lively

pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
PROMPT = torch.arange(3, 60)[None]
OFF = {"fused_layers": False}
CALLS = {
    "batch": {"tokens": [[5], [9]], "kernels": True},
    "several tokens": {"tokens": [[5, 9, 17]], "kernels": True},
    "too many tokens": {"tokens": [list(range(5, 15))]},
    "positions": {"tokens": [[5]], "position_ids": torch.tensor([[57]]), "kernels": True},
    "other positions": {"tokens": [[5]], "position_ids": torch.tensor([[60]])},
    "a mask of ones": {"tokens": [[5]], "attention_mask": torch.ones(1, 58), "kernels": True},
    "padding": {"tokens": [[5]], "attention_mask": (torch.arange(58) > 3)[None].long()},
    "hidden states": {"tokens": [[5]], "output_hidden_states": True},
}


@pytest.fixture
def steps(monkeypatch) -> list[bool]:
    """Whether each step that was asked of the C++ layers was computed there."""
    seen: list[bool] = []
    original = FusedDecoder.hidden

    def noted(self, *args):
        found = original(self, *args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(FusedDecoder, "hidden", noted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_generated_scores_equal_the_models_own(family, cache, steps):
    model, found = lively(family), []
    for extra in (OFF, {}):
        with saccade.attach(model, ContextParams(**CACHES[cache], **extra)) as attached:
            own = attached.new_cache()
            options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
            out = model.generate(PROMPT, past_key_values=own, max_new_tokens=6, **options)
            found.append(torch.cat(out.logits))
        assert any(steps) == (extra != OFF)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_calls_that_ask_for_more_are_the_models_own(call, steps):
    model, options = lively("llama"), dict(CALLS[call])
    tokens, kernels = torch.tensor(options.pop("tokens")), options.pop("kernels", False)
    found = []
    for extra in (OFF, {}):
        with saccade.attach(model, ContextParams(**extra)) as attached:
            own = attached.new_cache()
            model(PROMPT.expand(len(tokens), -1), past_key_values=own)
            out = model(tokens, past_key_values=own, **options)
            found.append(out.logits)
            assert own.seen == 57 + tokens.shape[1]
    assert any(steps) == kernels
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    if "output_hidden_states" in options:
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1


def test_gradients_are_the_models_own(steps):
    model = lively("llama")
    with saccade.attach(model) as attached:
        own = attached.new_cache()
        with torch.no_grad():
            model(PROMPT, past_key_values=own)
        model(torch.tensor([[5]]), past_key_values=own).logits.sum().backward()
    assert not any(steps)
    assert model.lm_head.weight.grad is not None


@torch.no_grad()
def test_beams_and_nested_runs_follow_their_own_options(steps):
    model = lively("llama")
    int8 = ContextParams(type_k="int8", type_v="int8")
    with saccade.attach(model, int8) as attached:
        alone = model.generate(PROMPT, max_new_tokens=5, num_beams=2, do_sample=False)
        assert any(steps)
        with saccade.Context(model, ContextParams(), check="off") as ctx:
            ctx.append(PROMPT[0])
            inside = ctx.logits(ctx.append([5])[0])
        again = model.generate(
            PROMPT, max_new_tokens=5, num_beams=2, past_key_values=attached.new_cache(),
            do_sample=False,
        )  # fmt: skip
    assert torch.equal(alone, again)
    with saccade.Context(model, ContextParams(**OFF), check="off") as ctx:
        ctx.append(PROMPT[0])
        torch.testing.assert_close(inside, ctx.logits(ctx.append([5])[0]), rtol=0, atol=1e-5)
    assert "forward" not in vars(model.model)
