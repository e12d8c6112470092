"""What keys receive: the weights of transformers' eager attention over the same keys."""

import pytest
import torch

import saccade
from saccade.cache import SlidingCache
from saccade.compress import POLICIES, KVzip, Rereading
from saccade.core import Unsupported
from saccade.runtime import ContextParams
from saccade.runtime.session import load_session, save_session
from tests.tiny_models import WINDOW, tiny_config, tiny_model

TOKENS = torch.arange(110) * 37 % 113 + 3
REREADING = Rereading(chunk=48, share=0.5, lead=4, sinks=3)


@pytest.fixture(scope="module")
def llama():
    return tiny_model(tiny_config("llama"))


def chunks():
    """(positions that are read, positions they see) by the definition, written out."""
    for start in range(0, 110, 48):
        stop, first = min(start + 48, 110), max(0, start - 4)
        read = [*range(first, start), *(i for i in range(start, stop) if i % 2)]
        yield read, [*range(min(3, first)), *range(first, stop)]


def eager_weights(model):
    """Largest weight `[layers, Hkv, n]` of each key over heads of a group and chunks, float64."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = torch.zeros(model.config.num_hidden_layers, 2, 110, dtype=torch.float64)
    for read, seen in chunks():
        tokens = torch.cat((TOKENS, TOKENS[read]))[None]
        size = tokens.shape[1]
        place = torch.arange(size)
        visible = place[:, None] >= place
        shown = torch.zeros(size, dtype=torch.bool)
        shown[seen] = shown[110:] = True
        full = visible & (shown | (place[:, None] < 110))
        near = visible & (place[:, None] - place < WINDOW)
        masks = {
            name: torch.zeros(1, 1, size, size).masked_fill(~each, -torch.inf)
            for name, each in (("full_attention", full), ("sliding_attention", near))
        }
        mask = masks if "gemma" in model.config.model_type else masks["full_attention"]
        with torch.no_grad():
            out = model(tokens, attention_mask=mask, output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            largest = weights[0, :, 110:, :110].double().unflatten(0, (2, -1)).amax((1, 2))
            found[layer] = torch.maximum(found[layer], largest)
    model.set_attn_implementation(own)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ["kvzip", "uniform_kvzip"])
def test_weights_are_those_of_eager_attention_and_the_caches_stay(family, name, monkeypatch):
    options = {"chunk": 48, "share": 0.5, "lead": 4, "sinks": 3}
    policy = type(POLICIES[name]())
    monkeypatch.setitem(POLICIES, name, lambda: policy(**options))
    model = tiny_model(tiny_config(family))
    expected = eager_weights(model)
    params = ContextParams(kv_policy=name, kv_budget=0.5, n_batch=20)
    with saccade.Context(model, params, check="off") as ctx:
        ctx.append(TOKENS)
        window, stores = ctx.observation_window, ctx.cache.stores
        before = [{n: x.clone() for n, x in s.state().tensors.items()} for s in stores]
        window.read_again()
        for layer, (store, held) in enumerate(zip(stores, before, strict=True)):
            assert store.seen == 110
            assert all(torch.equal(x, held[n]) for n, x in store.state().tensors.items())
            if not isinstance(store, SlidingCache):
                k, v = held["k"], held["v"]
                found = window.of(layer, k, v).received[0].double()
                assert torch.allclose(found, expected[layer], rtol=1e-4, atol=1e-7)


def test_all_heads_of_all_layers_share_the_budget(llama):
    """The kept keys are the best of the whole model; each head keeps the sinks."""
    params = ContextParams(kv_policy="kvzip", kv_budget=0.4)
    with saccade.Context(llama, params, check="off") as ctx:
        ctx.append(TOKENS)
        window, gathered = ctx.observation_window, [s.gather() for s in ctx.cache.stores]
        window.read_again()
        scores = [KVzip().scores(window.of(i, *g), 44)[0] for i, g in enumerate(gathered)]
        flat = torch.stack(scores).flatten()
        threshold = flat.sort(descending=True).values[44 * len(flat) // 110 - 1]
        ctx.compress()
        for layer, store in enumerate(ctx.cache.stores):
            positions = store.gather().positions[0]
            kept = torch.zeros(2, 110, dtype=torch.bool)
            for head, at in enumerate(positions):
                kept[head, at[at >= 0]] = True
            assert torch.equal(kept, scores[layer] >= threshold)


@pytest.mark.parametrize("name", ["kvzip", "uniform_kvzip"])
def test_a_second_prompt_is_compressed_with_the_first(llama, name):
    params = ContextParams(kv_policy=name, kv_budget=0.4, n_batch=30)
    with saccade.Context(llama, params, check="off") as ctx:
        for count in (110, 220):
            ctx.append(TOKENS)
            ctx.compress()
            lens = [
                s.kv_lens.float().mean() if name == "kvzip" else s.num_slots
                for s in ctx.cache.stores
            ]
            assert sum(lens) / len(lens) == round(0.4 * count)


@pytest.mark.parametrize("name", ["kvzip", "h2o"])
def test_a_session_goes_on_to_the_same_compression(llama, name, tmp_path):
    params = ContextParams(kv_policy=name, kv_budget=30, n_batch=40)
    with saccade.Context(llama, params) as ctx, saccade.Context(llama, params) as other:
        ctx.append(TOKENS)
        save_session(tmp_path / name, ctx)
        load_session(tmp_path / name, other)
        for one in (ctx, other):
            one.compress()
        for ours, theirs in zip(ctx.cache.stores, other.cache.stores, strict=True):
            mine, saved = ours.state().tensors, theirs.state().tensors
            assert all(torch.equal(mine[key], saved[key]) for key in mine)


def test_what_cannot_be_read_again_is_refused(llama):
    with pytest.raises(ValueError, match="reads the whole prompt again, of which kv_every=8"):
        ContextParams(kv_policy="kvzip", kv_budget=30, kv_every=8)
    with saccade.Context(llama, ContextParams(kv_policy="kvzip", kv_budget=30)) as ctx:
        ctx.append(TOKENS)
        with torch.inference_mode():
            ctx.model.hidden(TOKENS[None, :5], ctx.cache)
        with pytest.raises(Unsupported, match="of the 115 tokens in the caches 110 are known"):
            ctx.compress()


@pytest.mark.parametrize("n_batch", [512, 17])
def test_h2o_sums_the_weights_of_eager_attention(llama, n_batch):
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = llama(TOKENS[None], output_attentions=True).attentions
    llama.set_attn_implementation("sdpa")
    params = ContextParams(kv_policy="h2o", kv_budget=30, n_batch=n_batch)
    with saccade.Context(llama, params, check="off") as ctx:
        ctx.append(TOKENS)
        views = [store.view() for store in ctx.cache.stores]
        every = [view.k[0].clone() for view in views]
        ctx.compress()
        for layer, store in enumerate(ctx.cache.stores):
            mean = attentions[layer][0].double().sum(1).unflatten(0, (2, -1)).mean(1)
            mean[:, 95:] = torch.inf
            best = mean.topk(30, -1).indices.sort(-1).values
            assert torch.equal(
                store.view().k[0], every[layer].gather(1, best[..., None].expand(-1, -1, 16))
            )


def test_h2o_goes_on_counting_what_it_kept(llama):
    """With kv_every, weights of kept keys stay with them: those of whole caches, cut."""
    params = ContextParams(kv_policy="h2o", kv_budget=40, kv_every=10, n_batch=16)
    with saccade.Context(llama, params, check="off") as ctx:
        assert len(list(ctx.stream(TOKENS, n_predict=30))) == 30
        window = ctx.observation_window
        for layer, store in enumerate(ctx.cache.stores):
            received = window.state()[layer].received
            assert received.shape[2] == store.num_slots <= 50
            assert received[..., 0].min() > received[..., -1].max()
