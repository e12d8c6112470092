"""Exact speculation: the text, the caches and the random numbers are those of dense decoding."""

import pytest
import torch

import saccade
from saccade.core import Unsupported
from saccade.hf.fused_decoder import FusedDecoder
from saccade.runtime import ContextParams, Sampler, load_session, save_session
from saccade.sparse import BlockTopK, Quest
from scripts import family_configs
from tests.tiny_models import tiny_config, tiny_model

PROMPT = ((torch.arange(60) * 37) % 120 + 3).tolist()
TOPK = BlockTopK(block=4, top=4, sink_blocks=1, window_blocks=2)
QUEST = Quest(block=8, top=2, sink_blocks=1, window_blocks=2)
ALL = BlockTopK(block=4, top=99)
DRAFTED = {"sparse": TOPK, "n_draft": 4}
SAMPLED = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 5}
LENGTH = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama", num_hidden_layers=2))


def opened(model, **options):
    return saccade.Context(model, ContextParams(**options), check="off")


def written(ctx, prompt=PROMPT, n_predict=LENGTH, **options):
    return [each.token for each in ctx.stream(prompt, n_predict=n_predict, **options)]


def assert_same(ctx, dense):
    """Texts and the contents of all layers."""
    assert ctx.tokens == dense.tokens and ctx.next_token == dense.next_token
    assert ctx.seen == dense.seen == len(ctx.tokens)
    for ours, theirs in zip(ctx.cache.stores, dense.cache.stores, strict=True):
        found, expected = ours.state().tensors, theirs.state().tensors
        assert ours.seen == theirs.seen and found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.allclose(found[name].float(), x.float(), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"fused_layers": False}, {"page_size": 8}], ids=str)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("pattern", "n_draft"), [(TOPK, 8), (QUEST, 3)], ids=["topk", "quest"])
def test_text_and_caches_are_those_of_dense_decoding(model, options, sampling, pattern, n_draft):
    ours, theirs = Sampler(**sampling), Sampler(**sampling)
    drafted = {"sparse": pattern, "n_draft": n_draft}
    with opened(model, **options) as dense, opened(model, **options, **drafted) as ctx:
        assert written(ctx, sampler=ours) == written(dense, sampler=theirs)
        assert_same(ctx, dense)
    assert torch.equal(ours.state(), theirs.state())
    stats = ctx.stats
    assert 0 < stats.accepted < stats.drafted <= n_draft * stats.draft_rounds
    assert stats.accepted + stats.draft_rounds <= stats.decode_tokens == LENGTH
    assert stats.accepted_length == stats.accepted / stats.draft_rounds


def test_greedy_text_is_that_of_transformers(model):
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None
    )
    with opened(model, **DRAFTED) as ctx:
        assert written(ctx) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_that_read_all_keys_are_all_accepted(model, sampling):
    """A round gives its drafts and the token behind them: 25 tokens are read in five rounds."""
    with opened(model, sparse=ALL, n_draft=4) as ctx:
        written(ctx, n_predict=25, sampler=Sampler(**sampling))
    assert (ctx.stats.drafted, ctx.stats.accepted, ctx.stats.draft_rounds) == (20, 20, 5)
    assert ctx.stats.accepted_length == 4


def test_drafts_and_their_verification_are_one_call_of_cpp_each(model, monkeypatch):
    calls = []
    run = FusedDecoder._run

    def counted(self, cache, first, places, count, kinds):
        calls.append(count)
        return run(self, cache, first, places, count, kinds)

    with opened(model, sparse=ALL, n_draft=8) as ctx:
        ctx.append(PROMPT)
        monkeypatch.setattr(FusedDecoder, "_run", counted)
        monkeypatch.delattr(FusedDecoder, "_layer")
        written(ctx, prompt=[7], n_predict=9)
    assert calls == [1, *[1] * 8, 9]


@pytest.mark.parametrize("n_keep", [None, 4])
def test_a_full_context_ends_or_shifts_at_the_same_token(model, n_keep):
    options = {"n_ctx": len(PROMPT) + 10, "n_keep": n_keep}
    with opened(model, **options) as dense, opened(model, **options, **DRAFTED) as ctx:
        assert written(ctx) == written(dense) and ctx.finish_reason == dense.finish_reason
        assert_same(ctx, dense)


def test_an_end_token_ends_the_text_and_the_draft(model):
    with opened(model) as dense, opened(model, sparse=ALL, n_draft=8) as ctx:
        end = written(dense, n_predict=4)[-1]
        dense.reset()
        assert written(ctx, stop=[end]) == written(dense, stop=[end])
        assert ctx.finish_reason == "stop" and ctx.stats.drafted <= 3
        assert_same(ctx, dense)


@pytest.mark.parametrize("shown", [1, 3, 5])
def test_an_abandoned_stream_leaves_what_was_shown(model, shown):
    """Also where something asks for the caches between two tokens, which drops what is ahead."""
    with opened(model) as dense, opened(model, sparse=ALL, n_draft=4) as ctx:
        streams = [each.stream(PROMPT, n_predict=LENGTH) for each in (dense, ctx)]
        for _ in range(shown):
            assert next(streams[0]) == next(streams[1])
        ahead, seen = ctx.text._cache.seen, ctx.seen
        assert (ahead > seen) == (shown > 1) and ctx.cache_bytes > 0
        assert ctx.text._cache.seen == ahead  # so far nobody asked for the caches themselves
        assert_same(ctx, dense)
        assert [each.token for each in streams[0]] == [each.token for each in streams[1]]
        assert_same(ctx, dense)


def test_a_session_that_is_saved_in_a_draft_goes_on_as_dense_decoding(model, tmp_path):
    with opened(model) as dense:
        expected = written(dense, sampler=Sampler(**SAMPLED))
    with opened(model, **DRAFTED) as ctx:
        sampler = Sampler(**SAMPLED)
        stream = ctx.stream(PROMPT, n_predict=LENGTH, sampler=sampler)
        first = [next(stream).token for _ in range(9)]
        save_session(tmp_path / "a.session", ctx, sampler)
    with opened(model, **DRAFTED) as ctx:
        sampler = load_session(tmp_path / "a.session", ctx)
        assert first + written(ctx, (), LENGTH - 9, sampler=sampler) == expected


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gemma3", {}, "layer 0 of this model keeps a window and cannot go back"),
        ("lfm2_moe", {}, "layer . of this model is recurrent and cannot go back"),
        ("llama", {"rope_scaling_type": "dynamic", "rope_freq_scale": 0.5}, "the rotary tables of"),
    ],
)
def test_models_that_cannot_go_back_are_refused(name, options, text):
    refused = family_configs.tiny_model(name, family_configs.tiny_config(name))
    with pytest.raises(Unsupported, match=f"n_draft=4 .*{text}.*Leave n_draft unset"):
        opened(refused, **DRAFTED, **options)
