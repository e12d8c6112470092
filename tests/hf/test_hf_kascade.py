"""Kascade in a model: calibration against the model's own weights, steps by C++ and by torch."""

import numpy as np
import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.hf import HFModel, attach
from saccade.hf.kascade import calibrate_kascade
from saccade.runtime import ContextParams
from saccade.runtime.step import DecodeStep, captures
from saccade.sparse import BlockTopK, Kascade, KascadePlan
from tests.tiny_models import tiny_config, tiny_model

LAYERS = 4
TEXT = torch.arange(1100) * 37 % 90 + 3
SIZES = {"block": 8, "top": 3, "window_blocks": 1}


@pytest.fixture(scope="module")
def llama():
    return tiny_model(tiny_config("llama", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def plan(llama):
    pattern = Kascade(block=64, top=99)
    return calibrate_kascade(HFModel(llama, n_ctx_train=4096), TEXT, pattern=pattern, anchors=2)


def read(model, steps=10, **options):
    """Logits of steps behind a prompt."""
    with saccade.Context(model, ContextParams(**options)) as ctx:
        ctx.append(TEXT[:200])
        return torch.cat([ctx.logits(ctx.append(t[None])) for t in TEXT[200 : 200 + steps]])


def test_recalls_are_those_of_the_weights_that_the_model_returns(llama, plan):
    """Of the queries that end the eighths of the second of two chunks of 512."""
    with torch.no_grad():
        llama.set_attn_implementation("eager")
        weights = llama(TEXT[:1024][None], output_attentions=True).attentions
    found = {}
    for index, each in enumerate(weights):
        heads = each[0, :, 575::64].double().unflatten(0, (2, -1)).mean(1)  # [Hkv, 8, keys]
        found[index] = heads.unflatten(2, (16, 64)).sum(-1).numpy()
    assert plan.top == 2 and plan.tokens == 1024 and len(plan.anchors) == 2
    for index, layer in enumerate(plan.layers):
        if index == 0:
            assert layer is None
            continue
        shares = np.zeros((2, 2))
        for i in range(8):
            last = 8 + i
            for g in range(2):
                order = sorted(range(1, last - 1), key=lambda b: -found[layer.anchor][g, i, b])
                kept = {0, last - 1, last, *order[:2]}
                shares[:, g] += [found[index][h, i, list(kept)].sum() / 8 for h in range(2)]
        expected = shares.max(1) if layer.anchor != index else shares.diagonal()
        assert layer.recall == pytest.approx(expected.mean(), abs=1e-4)


def test_steps_by_cpp_layers_are_those_of_torch(llama, plan):
    options = {"sparse": Kascade(plan=plan, **SIZES)}
    found, dense = read(llama, **options), read(llama)
    torch.testing.assert_close(found, read(llama, fused_layers=False, **options))
    assert not torch.allclose(found, dense, atol=1e-3)


@pytest.mark.parametrize("stored", [{}, {"page_size": 16}, {"type_k": "int8", "type_v": "int8"}])
def test_all_blocks_are_the_dense_result(llama, plan, stored):
    whole = read(llama, sparse=Kascade(plan=plan, block=8, top=999), **stored)
    torch.testing.assert_close(whole, read(llama, **stored), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", [{"page_size": 16}, {"n_swa": 120, "n_sinks": 4}])
def test_caches_that_cpp_layers_do_not_score(llama, plan, stored):
    """Pages hold what one buffer holds; a window as long as the text hides nothing."""
    options = {"sparse": Kascade(plan=plan, **SIZES)}
    found = read(llama, **options, **stored)
    if "page_size" in stored:
        torch.testing.assert_close(found, read(llama, **options), atol=1e-4, rtol=1e-4)
    assert found.isfinite().all()


def test_a_captured_step_selects_as_a_call_does(llama, plan):
    params = ContextParams(sparse=Kascade(plan=plan, **SIZES))
    assert captures(params)
    with torch.inference_mode(), HFModel(llama).attached(params) as attached:
        found = []
        for stepping in (False, True):
            cache = attached.new_cache(params, reserve=256)
            attached.hidden(TEXT[None, :200], cache)
            step = DecodeStep(attached, cache) if stepping else None
            for token in TEXT[200:204]:
                if step is None:
                    hidden = attached.hidden(token[None, None], cache)
                    logits = attached.logits(hidden[:, -1]).float()
                else:
                    logits = step(int(token)).clone()
            found.append(logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_of_a_step_gives_what_eager_calls_give(llama, plan):
    params = ContextParams(sparse=Kascade(plan=plan, **SIZES))
    model = tiny_model(tiny_config("llama", num_hidden_layers=LAYERS)).cuda()
    with torch.inference_mode(), HFModel(model).attached(params) as attached:
        tokens, found = TEXT.cuda(), []
        for stepping in (False, True):
            cache = attached.new_cache(params, reserve=256)
            attached.hidden(tokens[None, :200], cache)
            step = DecodeStep(attached, cache) if stepping else None
            for token in tokens[200:210]:
                hidden = None if step else attached.hidden(token[None, None], cache)
                logits = step(token[None]).clone() if step else attached.logits(hidden[:, -1])
            found.append(logits.float())
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_padded_row_decodes_as_it_does_alone(llama, plan):
    ids, room = TEXT[:200], 24
    with attach(llama, ContextParams(sparse=Kascade(plan=plan, **SIZES))):
        alone = llama.generate(ids[None], max_new_tokens=8, do_sample=False, pad_token_id=1)
        batch = torch.stack((TEXT[: 200 + room].flip(0), torch.cat((ids.new_ones(room), ids))))
        mask = torch.ones_like(batch)
        mask[1, :room] = 0
        found = llama.generate(
            batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1
        )
    assert torch.equal(found[1, room:], alone[0])


def test_a_plan_of_another_model_is_refused(llama, plan):
    other = tiny_model(tiny_config("llama", num_hidden_layers=LAYERS))
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    with pytest.raises(BadInput, match="calibrated for another model: LlamaForCausalLM with norms"):
        saccade.Context(other, ContextParams(sparse=Kascade(plan=plan)))
    half = tiny_model(tiny_config("llama", num_hidden_layers=LAYERS)).bfloat16()
    with saccade.Context(half, ContextParams(sparse=Kascade(plan=plan))) as ctx:
        ctx.append(TEXT[:40])


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"tokens": TEXT[:900]}, BadInput, "of 1,024 tokens or more, got 900"),
        ({"anchors": 0}, ValueError, "at least 1, got 0"),
        ({"params": ContextParams(sparse=BlockTopK())}, ValueError, "is what is chosen here"),
    ],
)
def test_errors(llama, given, error, says):
    with pytest.raises(error, match=says):
        calibrate_kascade(HFModel(llama), **({"tokens": TEXT} | given))


def test_a_policy_leaves_layers_with_other_keys(plan):
    with pytest.raises(ValueError, match="under kv_policy each layer keeps other tokens"):
        ContextParams(sparse=Kascade(plan=plan), kv_policy="snapkv", kv_budget=64)
    assert isinstance(plan, KascadePlan)
