"""Importance and compression of whole models; weights are those of transformers' eager code."""

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.runtime import ContextParams
from saccade.runtime.importance import ReceivedAttention, token_importance
from saccade.runtime.session import load_session, save_session
from tests.tiny_models import tiny_config, tiny_model

TOKENS = torch.arange(3, 73) % 120 + 3
FAMILIES = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")


@pytest.fixture(scope="module")
def llama():
    return tiny_model(tiny_config("llama"))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(tiny_config(request.param))


def eager_weights(model):
    """Attention weights `[H, n, n]` of each layer by transformers' eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(TOKENS[None], output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [weights[0].double() for weights in found]


@pytest.mark.parametrize("n_batch", [512, 9])
def test_received_attention_is_the_weight_eager_attention_gives(model, n_batch):
    """Per layer, over the queries in reach: those of the window in sliding layers."""
    received = ReceivedAttention()
    with saccade.Context(model, ContextParams(n_batch=n_batch)) as ctx:
        ctx.cache.observer = received.observe
        ctx.append(TOKENS)
        windows = ctx.model.facts.windows
    expected = torch.zeros(70, dtype=torch.float64)
    for weights, window in zip(eager_weights(model), windows, strict=True):
        reach = torch.arange(70, 0, -1).clamp_max(window or 70)
        expected += weights.sum((0, 1)) / reach
    assert torch.allclose(received.scores().double(), expected, rtol=1e-3)


def test_a_session_saved_before_compression_compresses_alike(tmp_path):
    """The observed queries are saved with softcap, learned sinks and blocks."""
    for name, options in (
        ("gemma2", {}),
        ("gpt_oss", {}),
        ("llama", {"sparse": saccade.sparse.Strided(block=8)}),
    ):
        model = tiny_model(tiny_config(name))
        params = ContextParams(kv_policy="snapkv", kv_budget=20, n_batch=40, **options)
        with saccade.Context(model, params) as ctx, saccade.Context(model, params) as other:
            ctx.append(TOKENS)
            save_session(tmp_path / name, ctx)
            load_session(tmp_path / name, other)
            first = ctx.observation_window.state()
            for layer, queries in other.observation_window.state().items():
                for ours, theirs in zip(queries, first[layer], strict=True):
                    same = torch.equal if isinstance(ours, torch.Tensor) else type(ours).__eq__
                    assert ours is theirs or same(ours, theirs)
            for one in (ctx, other):
                one.compress()
            for ours, theirs in zip(ctx.cache.stores, other.cache.stores, strict=True):
                mine, saved = ours.state().tensors, theirs.state().tensors
                assert all(torch.equal(mine[key], saved[key]) for key in mine)


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])
@pytest.mark.parametrize("budget", [1, 2, 40, 0.3, 10**6])
def test_a_prompt_of_any_length_keeps_its_budget(llama, policy, budget):
    """Never more keys than the budget; the first token stays; generation goes on."""
    for length in (1, 5, 70):
        with saccade.Context(llama, ContextParams(kv_policy=policy, kv_budget=budget)) as ctx:
            ctx.append(TOKENS[:length])
            whole = ctx.cache.stores[0].view().k if policy == "snapkv" else None
            ctx.compress()
            kept = budget if isinstance(budget, int) else max(1, round(budget * length))
            for store in ctx.cache.stores:
                count = store.num_slots if policy == "snapkv" else store.kv_lens.sum().item() / 2
                assert count == min(kept, length)
            if whole is not None:
                assert torch.equal(ctx.cache.stores[0].view().k[:, :, 0], whole[:, :, 0])
            assert len(list(ctx.stream([9], n_predict=3))) == 3


class TestBadInput:
    def test_a_context_with_tokens(self, llama):
        with saccade.Context(llama) as ctx:
            ctx.append([3, 4])
            with pytest.raises(BadInput, match="needs a context without tokens, this one has 2"):
                token_importance(ctx, TOKENS)

    def test_a_context_that_observes_for_a_policy(self, llama):
        params = ContextParams(kv_policy="snapkv", kv_budget=9)
        with (
            saccade.Context(llama, params) as ctx,
            pytest.raises(BadInput, match="needs a context without kv_policy"),
        ):
            token_importance(ctx, TOKENS)

    @pytest.mark.parametrize("kind", ["self_information", "received_attention", "both"])
    def test_one_token(self, llama, kind):
        with saccade.Context(llama) as ctx:
            assert token_importance(ctx, [5], kind=kind).tolist() == [0.0]

    def test_the_observer_leaves_with_an_error(self, llama):
        with saccade.Context(llama, ContextParams(n_ctx=9)) as ctx:
            with pytest.raises(BadInput, match="do not fit into n_ctx=9"):
                token_importance(ctx, TOKENS)
            assert ctx.cache.observer is None
