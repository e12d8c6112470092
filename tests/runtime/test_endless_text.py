"""A window with sinks beyond the trained length: positions are those inside the cache."""

import sys

import pytest
import torch
from transformers import DynamicCache

import saccade
from saccade.cache import RingCache
from saccade.core import Unsupported
from saccade.hf import attach
from saccade.runtime import ContextParams, DecodeStep
from tests.tiny_models import tiny_config, tiny_model

TRAINED, WINDOW, SINKS = 64, 12, 3
BLOCK = TRAINED // 4
NEAREST = WINDOW + SINKS - 1
TOKENS = (torch.arange(3, 403) * 7) % 120 + 3


def params(**options):
    return ContextParams(n_swa=WINDOW, n_sinks=SINKS, **options)


def short(name="llama", **changes):
    if name == "llama":
        changes["num_hidden_layers"] = 2
    return tiny_model(tiny_config(name, max_position_embeddings=TRAINED, **changes))


@pytest.fixture(scope="module")
def model():
    return short()


def logits_of(model, tokens, **options):
    with saccade.Context(model, params(**options)) as ctx:
        return ctx.logits(ctx.append(tokens, wanted=len(tokens)))


@torch.inference_mode()
def by_formula(model, tokens):
    """Logits by transformers alone: block after block, the sinks at positions after the window.

    The keys and values of all layers are kept by transformers' own cache; those of the sinks are
    rotated for other positions by the formula of RoPE, in float64.
    """
    config = model.config
    base, dim = config.rope_parameters["rope_theta"], config.head_dim
    angles = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cache, found, first = DynamicCache(config=config), [], 0
    originals = None
    while first < len(tokens):
        block = TRAINED if first < TRAINED else BLOCK
        stop = min(first + block, len(tokens))
        if first >= TRAINED:
            originals = originals or [layer.keys[:, :, :SINKS].clone() for layer in cache.layers]
            for layer, keys in zip(cache.layers, originals, strict=True):
                turn = (first - NEAREST) * angles
                low, high = keys.double().chunk(2, -1)
                moved = (low * turn.cos() - high * turn.sin(), high * turn.cos() + low * turn.sin())
                layer.keys[:, :, :SINKS] = torch.cat(moved, -1).float()
        q, k = torch.arange(first, stop)[:, None], torch.arange(stop)[None]
        seen = (k <= q) & ((q - k < WINDOW) | (k < SINKS))
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        out = model(
            tokens[None, first:stop],
            attention_mask=mask,
            position_ids=torch.arange(first, stop)[None],
            past_key_values=cache,
        )
        found.append(out.logits[0])
        first = stop
    return torch.cat(found)


def test_beyond_the_trained_length_the_sinks_follow_the_window(model):
    tokens = TOKENS[:200]
    ours, expected = logits_of(model, tokens), by_formula(model, tokens)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_inside_the_trained_length_nothing_is_moved(model, monkeypatch):
    ours = logits_of(model, TOKENS[:TRAINED])
    expected = by_formula(model, TOKENS[:200])[-1]
    monkeypatch.setattr(sys.modules["saccade.hf.attach"], "move_sinks", lambda *_: None)
    assert torch.equal(ours, logits_of(model, TOKENS[:TRAINED]))
    assert not torch.allclose(logits_of(model, TOKENS[:200])[-1], expected, atol=1e-2)


@pytest.mark.parametrize("n_batch", [1, 7])
def test_chunks_change_nothing(model, n_batch):
    tokens = TOKENS[:100]
    assert torch.allclose(
        logits_of(model, tokens, n_batch=n_batch), logits_of(model, tokens), atol=2e-5
    )


@pytest.mark.parametrize("name", ["gemma3", "phi3", "gpt_oss"])
def test_models_of_other_kinds(name):
    """Some layers slide by themselves, some rotate a part of a head: chunks still agree."""
    model = short(name)
    whole = logits_of(model, TOKENS[:100])
    assert torch.allclose(logits_of(model, TOKENS[:100], n_batch=13), whole, atol=1e-4)
    assert whole.isfinite().all()


def test_steps_continue_a_prompt(model):
    whole = logits_of(model, TOKENS[:120])
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:50])
        step = DecodeStep(ctx.model, ctx.cache)
        ours = torch.stack([step(int(token))[0].clone() for token in TOKENS[50:120]])
    assert torch.allclose(ours, whole[50:], atol=5e-5)


@pytest.mark.parametrize("length", [40, 70, 118])
def test_going_back_and_on_gives_the_same_as_going_on(model, length):
    whole = logits_of(model, TOKENS[:140])
    with saccade.Context(model, params(ctx_checkpoints=30, n_batch=4)) as ctx:
        ctx.append(TOKENS[:140])
        kept = ctx.reuse(torch.cat((TOKENS[:length], TOKENS[:1])))
        assert 0 < kept <= length
        ours = ctx.logits(ctx.append(TOKENS[kept:140], wanted=140 - kept))
    assert torch.allclose(ours, whole[kept:], atol=5e-5)


@pytest.mark.parametrize("length", [60, 64, 117])
def test_a_session_goes_on_as_if_it_had_not_stopped(model, length, tmp_path):
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:length])
        saccade.save_session(tmp_path / "text", ctx)
        expected = ctx.logits(ctx.append(TOKENS[length:140], wanted=140 - length))
    with saccade.Context(model, params()) as ctx:
        saccade.load_session(tmp_path / "text", ctx)
        found = ctx.logits(ctx.append(TOKENS[length:140], wanted=140 - length))
    assert torch.equal(found, expected)


def test_after_a_reset_a_text_begins_anew(model):
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:140])
        ctx.reset()
        again = ctx.logits(ctx.append(TOKENS[:90], wanted=90))
    assert torch.allclose(again, logits_of(model, TOKENS[:90]), atol=2e-5)


def test_scaled_positions_move_sinks_later(model):
    """YaRN x2 reaches twice as far before anything is moved."""
    scaled = params(rope_scaling_type="yarn", rope_freq_scale=0.5)
    with saccade.Context(model, scaled) as ctx:
        rings = [store for store in ctx.cache.stores if isinstance(store, RingCache)]
        assert {ring.places.reach for ring in rings} == {2 * TRAINED}
        ctx.append(TOKENS[:200])
        assert ctx.logits(ctx.append(TOKENS[200:201])).isfinite().all()


def test_generate_goes_on_beyond_the_trained_length(model):
    with saccade.Context(model, params()) as ctx:
        ours = [t.token for t in ctx.stream(TOKENS[:50], n_predict=40)]
    with attach(model, params()) as attached:
        theirs = attached.model.generate(
            TOKENS[None, :50], max_new_tokens=40, do_sample=False, pad_token_id=0
        )
    assert theirs[0, 50:].tolist() == ours


def test_a_long_prompt_in_one_call_is_refused_or_read_in_chunks(model):
    with attach(model, params()) as attached:
        with pytest.raises(Unsupported, match=f"at most {BLOCK} tokens in a call"):
            attached.model(TOKENS[None], past_key_values=attached.new_cache())
        theirs = attached.model.generate(
            TOKENS[None, :200], max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    with saccade.Context(model, params()) as ctx:
        ours = [t.token for t in ctx.stream(TOKENS[:200], n_predict=5)]
    assert theirs[0, 200:].tolist() == ours


def test_moved_sinks_take_no_further_memory(model):
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:30])
        before = ctx.cache_bytes
        ctx.append(TOKENS[30:300])
        assert ctx.cache_bytes == before


@torch.inference_mode()
def test_roundings_do_not_add_up():
    """Sinks in bfloat16 that were moved a thousand times equal those that were moved once."""
    model = short().bfloat16()
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:200])
        ring = next(store for store in ctx.cache.stores if isinstance(store, RingCache))
        k, places = ring.view().k, ring.places
        for position in (*range(TRAINED, 1000 * BLOCK, BLOCK), TRAINED):
            places.place(k, position, 1)
        often = k[:, :, :SINKS].clone()
        places.place(k, 0, 1)
        places.place(k, TRAINED, 1)
        assert torch.equal(often, k[:, :, :SINKS])


def test_keys_that_cannot_be_moved_are_refused_where_they_have_to_be(model, monkeypatch):
    def refuse(*_):
        raise Unsupported("no rotation is known")

    monkeypatch.setattr("saccade.hf.moved_sinks.key_rotations", refuse)
    with saccade.Context(model, params()) as ctx:
        ctx.append(TOKENS[:TRAINED])
        with pytest.raises(Unsupported, match="longer than the 64 tokens"):
            ctx.append(TOKENS[:1])
        assert ctx.seen == TRAINED
