"""Context on a tiny random model: what each option may change and what it must not."""

import pytest
import torch

import saccade
from saccade.compress import POLICIES
from saccade.core import BadInput, Unsupported
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.runtime import ContextParams, Sampler
from saccade.runtime.importance import token_importance
from tests.tiny_models import tiny_config, tiny_model

TOKENS = torch.arange(3, 103) % 120 + 3


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"))


def logits_of(model, params, tokens=TOKENS, **options):
    with saccade.Context(model, params, **options) as ctx:
        return ctx.logits(ctx.append(tokens, wanted=len(tokens)))


@pytest.fixture(scope="module")
def exact(model):
    return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("n_batch", [1, 7, 64, 512])
@pytest.mark.parametrize("flash_attn", ["auto", "enabled", "disabled"])
def test_chunked_equals_whole(model, exact, n_batch, flash_attn):
    ours = logits_of(model, ContextParams(n_batch=n_batch, flash_attn=flash_attn))
    assert torch.allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize("n_batch", [7, 512])
def test_pages_change_nothing(model, exact, n_batch):
    ours = logits_of(model, ContextParams(page_size=8, n_batch=n_batch))
    assert torch.allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("n_batch", [1, 9, 100])
def test_ring_equals_masked_dense(model, sinks, n_batch):
    """Any chunking of a windowed run equals one pass over all tokens with a window mask."""
    params = ContextParams(n_swa=16, n_sinks=sinks, n_batch=n_batch)
    whole = ContextParams(n_swa=16, n_sinks=sinks, n_batch=512, backend="reference")
    assert torch.allclose(logits_of(model, params), logits_of(model, whole), atol=2e-5)


def test_a_window_as_long_as_the_text_changes_nothing(model, exact):
    assert torch.allclose(logits_of(model, ContextParams(n_swa=100)), exact, atol=2e-5)


def test_window_memory_stays(model):
    sizes = []
    for tokens in (TOKENS[:40], TOKENS):
        with saccade.Context(model, ContextParams(n_swa=16, n_batch=8)) as ctx:
            ctx.append(tokens)
            sizes.append(ctx.cache_bytes)
    assert sizes[0] == sizes[1]


def test_wanted_hidden_states_are_the_last_ones(model):
    with saccade.Context(model, ContextParams(n_batch=7)) as ctx:
        everything = ctx.append(TOKENS, wanted=100)
    with saccade.Context(model, ContextParams(n_batch=7)) as ctx:
        some = ctx.append(TOKENS, wanted=10)
    assert some.shape == (10, 64) and torch.allclose(some, everything[-10:], atol=1e-6)


def test_quantized_is_close_and_smaller(model, exact):
    params = ContextParams(type_k="int8", type_v="int8", n_batch=16)
    ours = logits_of(model, params, TOKENS.repeat(4))[:100]
    assert (ours - exact).abs().max() < 0.1


class TestPolicy:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_keeping_all_changes_nothing(self, model, policy):
        logits = []
        for params in (ContextParams(), ContextParams(kv_policy=policy, kv_budget=1.0)):
            with saccade.Context(model, params) as ctx:
                ctx.append(TOKENS)
                ctx.compress()
                logits.append(ctx.logits(ctx.append([5, 6, 7], wanted=3)))
        assert torch.equal(*logits)

    def test_memory_is_freed(self, model):
        params = ContextParams(kv_policy="snapkv", kv_budget=70, n_batch=64)
        with saccade.Context(model, params, reserve=1000) as ctx:
            ctx.append(TOKENS.repeat(5))
            before = ctx.cache_bytes
            ctx.compress()
            assert ctx.cache_bytes < before / 2 and ctx.seen == 500
            assert all(layer.num_slots == 70 for layer in ctx.cache.stores)

    def test_heads_compete_for_the_budget_of_a_layer(self, model):
        """Ragged: the budget of a layer is met, heads differ, memory is near that of snapkv."""
        sizes = {}
        for policy in ("snapkv", "ada_snapkv"):
            params = ContextParams(kv_policy=policy, kv_budget=150, n_batch=64)
            with saccade.Context(model, params) as ctx:
                ctx.append(TOKENS.repeat(5))
                before = ctx.cache_bytes
                ctx.compress()
                sizes[policy] = ctx.cache_bytes
        kv_lens = torch.stack([layer.kv_lens for layer in ctx.cache.stores])
        assert (kv_lens.sum((1, 2)) == 2 * 150).all() and len(kv_lens.unique()) > 2
        assert before / 3 > sizes["ada_snapkv"] and sizes["ada_snapkv"] < 1.1 * sizes["snapkv"]

    def test_a_second_prompt_is_compressed_with_the_first(self, model):
        params = ContextParams(kv_policy="ada_snapkv", kv_budget=80)
        with saccade.Context(model, params) as ctx:
            for _ in range(3):
                assert len(list(ctx.stream(TOKENS, n_predict=5))) == 5
            kv_lens = torch.stack([layer.kv_lens for layer in ctx.cache.stores])
            assert (kv_lens.sum((1, 2)) == 2 * (80 + 5)).all() and ctx.seen == 3 * 105

    def test_a_full_ragged_context_shifts(self, model):
        params = ContextParams(kv_policy="ada_snapkv", kv_budget=80, n_ctx=110, n_keep=4)
        with saccade.Context(model, params) as ctx:
            assert len(list(ctx.stream(TOKENS, n_predict=40))) == 40
            assert ctx.seen <= 110


class TestStream:
    def test_greedy_equals_generate(self, model):
        prompt = TOKENS[:20]
        expected = model.generate(prompt[None], max_new_tokens=9, do_sample=False)[0, 20:]
        with saccade.Context(model) as ctx:
            tokens = [item.token for item in ctx.stream(prompt, n_predict=9)]
        assert tokens == expected.tolist()
        assert ctx.stats.prompt_tokens == 20 and ctx.stats.decode_tokens == 9
        assert ctx.stats.cache_bytes > 0

    def test_stops_at_a_stop_token(self, model):
        with saccade.Context(model) as ctx:
            free = [item.token for item in ctx.stream(TOKENS[:20], n_predict=9)]
        with saccade.Context(model) as ctx:
            cut = [item.token for item in ctx.stream(TOKENS[:20], n_predict=9, stop=[free[4]])]
        assert cut == free[: free.index(free[4])]

    def test_sampling_repeats_with_its_seed(self, model):
        runs = []
        for _ in range(2):
            with saccade.Context(model) as ctx:
                sampler = Sampler(temperature=1.0, seed=5)
                stream = ctx.stream(TOKENS[:20], n_predict=9, sampler=sampler)
                runs.append([item.token for item in stream])
        assert runs[0] == runs[1]

    def test_a_full_context_ends(self, model):
        with saccade.Context(model, ContextParams(n_ctx=24)) as ctx:
            assert len(list(ctx.stream(TOKENS[:20], n_predict=50))) == 5

    @pytest.mark.parametrize(
        "options",
        [{}, {"page_size": 4}, {"offload_kqv": False}, {"type_k": "int8", "type_v": "int8"}],
    )
    def test_a_full_context_shifts(self, model, options):
        with saccade.Context(model, ContextParams(n_ctx=24, n_keep=4, **options)) as ctx:
            assert len(list(ctx.stream(TOKENS[:20], n_predict=50))) == 50
            assert ctx.seen <= 24

    def test_a_window_has_no_limit(self, model):
        params = ContextParams(n_ctx=24, n_swa=8, n_sinks=2)
        with saccade.Context(model, params) as ctx:
            assert len(list(ctx.stream(TOKENS[:20], n_predict=40))) == 40


def test_shift_is_exact_at_the_first_layer(model):
    """The first layer's keys depend on token and position only, so a shift equals a fresh read."""
    with saccade.Context(model) as ctx:
        ctx.append(TOKENS[:40])
        ctx.shift(8)
        shifted = ctx.cache.stores[0].view()
    with saccade.Context(model) as ctx:
        ctx.append(torch.cat((TOKENS[:8], TOKENS[24:40])))
        expected = ctx.cache.stores[0].view()
    assert torch.allclose(shifted.k, expected.k, atol=1e-5)
    assert torch.allclose(shifted.v, expected.v, atol=1e-5)


@pytest.fixture(scope="module")
def hybrids():
    return {name: tiny_model(tiny_config(name)) for name in ("gemma2", "gemma3", "gpt_oss")}


class TestHybrid:
    """Models whose layers are partly sliding: windows of 8 beside full attention."""

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
    @pytest.mark.parametrize("checkpoints", [0, 3])
    def test_a_common_prefix_is_read_once(self, hybrids, family, checkpoints):
        model, other = hybrids[family], torch.cat((TOKENS[:70], TOKENS[:20]))
        params = ContextParams(n_batch=16, ctx_checkpoints=checkpoints)
        with saccade.Context(model, params) as ctx:
            assert ctx.reuse(TOKENS) == 0
            ctx.append(TOKENS)
            kept = ctx.reuse(other)
            assert kept == (64 if checkpoints else 0)
            ours = ctx.logits(ctx.append(other[kept:], wanted=20))
            assert ctx.tokens == other.tolist()
        assert torch.allclose(ours, logits_of(model, ContextParams(), other)[-20:], atol=2e-5)

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
    def test_shift_is_exact_at_the_first_layer(self, hybrids, family):
        kept = []
        for shifted in (True, False):
            with saccade.Context(hybrids[family], ContextParams(n_batch=1)) as ctx:
                ctx.append(TOKENS[:40] if shifted else torch.cat((TOKENS[:4], TOKENS[22:40])))
                if shifted:
                    ctx.shift(4)
                kept.append(ctx.cache.stores[0].view())
        ours, expected = (dense(view) for view in kept)
        assert torch.equal(ours.positions, expected.positions)
        assert torch.allclose(ours.k, expected.k, atol=1e-5)
        assert torch.allclose(ours.v, expected.v, atol=1e-5)

    def test_endless_generation_in_a_short_context(self, hybrids):
        params = ContextParams(n_ctx=40, n_keep=4)
        with saccade.Context(hybrids["gemma3"], params) as ctx:
            assert len(list(ctx.stream(TOKENS[:30], n_predict=60))) == 60


def test_reuse_leaves_a_token_to_read(model):
    with saccade.Context(model, ContextParams(n_batch=16)) as ctx:
        ctx.append(TOKENS)
        assert ctx.reuse(TOKENS) == 99 and ctx.seen == 99
        assert ctx.reuse([9, 9, 9]) == 0 and ctx.tokens == []
        ctx.append(TOKENS[:20])
        assert ctx.reuse(TOKENS) == 20


@pytest.mark.parametrize(("bits", "bound"), [("int8", 0.01), ("int4", 0.15)])
def test_shifted_quantized_keys_stay_within_their_error(model, bits, bound):
    """Five shifts, so that the oldest keys were quantized six times."""
    keys = []
    tokens = TOKENS.repeat(6)
    for params in (ContextParams(type_k=bits, type_v=bits), ContextParams()):
        with saccade.Context(model, params) as ctx:
            for part in tokens.split(120):
                ctx.append(part)
                ctx.shift(100)
            nothing = torch.zeros(1, 2, 0, 16)
            with torch.inference_mode():
                keys.append(dense(ctx.cache.stores[0].append(nothing, nothing)).k)
    assert keys[0].shape == keys[1].shape
    error = (hadamard_transform(keys[0]) - keys[1]).norm() / keys[1].norm()
    assert 0 < error < bound


@pytest.mark.parametrize("kind", ["self_information", "received_attention", "both"])
def test_importance_compresses(model, kind):
    with saccade.Context(model, ContextParams(n_batch=16)) as ctx:
        scores = token_importance(ctx, TOKENS, kind=kind)
    assert scores.shape == (100,) and scores.isfinite().all()
    kept = saccade.compress_context(TOKENS, scores, 30)
    assert len(kept) == 30
    if kind == "self_information":
        assert kept[0] == TOKENS[0]


def test_importance_does_not_depend_on_chunks(model):
    scores = []
    for n_batch in (100, 13):
        with saccade.Context(model, ContextParams(n_batch=n_batch)) as ctx:
            scores.append(token_importance(ctx, TOKENS, kind="received_attention"))
    assert (scores[0] - scores[1]).abs().max() <= 1.01 / 99  # neighbours in rank may swap


class TestBadInput:
    def test_empty_prompt(self, model):
        with saccade.Context(model) as ctx, pytest.raises(BadInput, match="the prompt is empty"):
            ctx.append([])

    def test_too_long(self, model):
        with (
            saccade.Context(model, ContextParams(n_ctx=50)) as ctx,
            pytest.raises(BadInput, match="100 tokens do not fit into n_ctx=50. Raise n_ctx"),
        ):
            ctx.append(TOKENS)

    def test_more_than_memory(self, model):
        with pytest.raises(BadInput, match="of memory are free. Lower n_ctx, set a window"):
            saccade.Context(model, ContextParams(n_ctx=10**12))

    def test_shift_of_nothing(self, model):
        with saccade.Context(model) as ctx:
            ctx.append(TOKENS[:5])
            with pytest.raises(Unsupported, match="nothing to remove after n_keep=5 of 5 tokens"):
                ctx.shift(5)


def test_the_model_is_restored(model, exact):
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), saccade.Context(model, ContextParams(n_swa=8)) as ctx:
        ctx.append(TOKENS)
        raise RuntimeError
    assert model.config._attn_implementation == before
    assert torch.equal(model(TOKENS[None]).logits[0], exact)
