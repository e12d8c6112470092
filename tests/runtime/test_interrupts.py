"""After an exception at any moment a context goes on as one that has read the same tokens."""

import os
import random

import pytest
import torch

import saccade
from saccade.runtime import ContextParams, Sampler
from saccade.sparse import BlockTopK
from tests.runtime.interrupts import Interrupt, interrupted, lines_of
from tests.tiny_models import tiny_config, tiny_model

COUNT = int(os.environ.get("SACCADE_FUZZ", "3"))
"""Interrupts of each kind of cache, at random lines; thousands are a matter of minutes."""
PROMPT = (torch.arange(3, 33) % 120 + 3).tolist()
EXACT = {
    "dense": ("llama", {}),
    "ring": ("llama", {"n_swa": 6, "n_sinks": 2}),
    "paged": ("llama", {"page_size": 8}),
    "hybrid": ("gemma3", {"ctx_checkpoints": 2}),
    "drafted": ("llama", {"sparse": BlockTopK(block=4, top=4), "n_draft": 3}),
}
CLOSE = {
    "int8": ("llama", {"type_k": "int8", "type_v": "int8"}),
    "compressed": ("llama", {"kv_policy": "snapkv", "kv_budget": 20}),
    "ragged": ("llama", {"kv_policy": "ada_snapkv", "kv_budget": 20}),
    "compressed int4": (
        "llama",
        {"kv_policy": "snapkv", "kv_budget": 40, "type_k": "int4", "type_v": "int4"},
    ),
}
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
STEPPED = ("dense", "ring", "int8", "hybrid")


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, tiny_model(tiny_config(name, **SMALL[name])))


def opened(model, options):
    ctx = saccade.Context(model, ContextParams(n_batch=8, **options))
    list(ctx.stream(PROMPT, n_predict=2))
    return ctx


def work(ctx):
    """A prompt in chunks, tokens, a rollback and a reset."""
    list(ctx.stream(range(50, 60), n_predict=3))
    ctx.reuse([*ctx.tokens[:-3], 7])
    ctx.append([8, 9])
    ctx.reset()
    ctx.append(PROMPT[:12])


def waiting(ctx):
    following = ctx.next_token
    return [following.token] if following is not None and following.shown else []


def agrees(ctx):
    """Whether listed tokens and all layers agree."""
    return {layer.seen for layer in ctx.cache.stores} == {len(ctx.tokens)} == {ctx.seen}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", [*EXACT, *CLOSE])
def test_an_interrupt_at_any_line(models, monkeypatch, kind, stepped):
    if stepped and kind not in STEPPED:
        pytest.skip("this cache needs the host for each token")
    monkeypatch.setattr(saccade.runtime.Context, "_can_step", lambda self: stepped)
    name, options = (EXACT | CLOSE)[kind]
    model, chance = models(name), random.Random(f"{kind} {stepped}")
    for _ in range(2):  # the first run also works out what later ones know
        with opened(model, options) as ctx:
            lines = lines_of(lambda: work(ctx))
    for _ in range(COUNT):
        with opened(model, options) as ctx:
            assert interrupted(lambda: work(ctx), chance.randrange(lines))
            assert agrees(ctx)
            text = [*ctx.tokens, *waiting(ctx), 9]
            ours = ctx.logits(ctx.append([9]))
            assert ctx.tokens == text and agrees(ctx) and ours.isfinite().all()
            assert len(list(ctx.stream(n_predict=2))) == 2
        if kind in EXACT:
            with saccade.Context(model, ContextParams(**options)) as ctx:
                assert torch.allclose(ours, ctx.logits(ctx.append(text)), atol=2e-5)


@pytest.mark.parametrize("layer", range(2))
@pytest.mark.parametrize(
    "options", [{}, {"n_swa": 6}, {"type_k": "int4", "type_v": "int4"}], ids=str
)
@pytest.mark.parametrize("count", [1, 20])
def test_an_exception_behind_a_layer_undoes_what_was_read(models, options, layer, count):
    model, failing = models("llama"), [False]

    def fail(*_):
        if failing[0]:
            raise RuntimeError("no memory")

    hook = model.model.layers[layer].register_forward_hook(fail)
    with opened(model, options) as ctx:
        before = ctx.tokens
        failing[0] = True
        with pytest.raises(RuntimeError, match="no memory"):
            ctx.append(PROMPT[:count])
        failing[0] = False
        assert agrees(ctx) and ctx.tokens[: len(before)] == before
        assert len(list(ctx.stream(n_predict=2))) == 2
    hook.remove()


def test_a_sampler_that_fails_is_asked_again(models):
    class Moody(Sampler):
        moods = iter([False, True, False, True, False])

        def pick(self, logits):
            if next(self.moods, False):
                raise ValueError("not now")
            return super().pick(logits)

    with saccade.Context(models("llama")) as ctx:
        expected = [each.token for each in ctx.stream(PROMPT, n_predict=6)]
    shown = []
    with saccade.Context(models("llama")) as ctx:
        prompt = PROMPT
        while len(shown) < 6:
            try:
                for each in ctx.stream(prompt, n_predict=6 - len(shown), sampler=Moody()):
                    shown.append(each.token)
            except ValueError:
                prompt = ()
            assert agrees(ctx)
        assert shown == expected and ctx.tokens[: len(PROMPT)] == PROMPT


def test_a_shift_that_was_interrupted_is_not_half_done(models):
    """Whatever line: the tokens are those before or those after, and the layers agree."""
    with opened(models("llama"), {}) as ctx:
        before = ctx.tokens
        lines = lines_of(lambda: ctx.shift(4))
        after = ctx.tokens
    chance = random.Random(0)
    for _ in range(COUNT):
        with opened(models("llama"), {}) as ctx:
            assert interrupted(lambda: ctx.shift(4), chance.randrange(lines))
            assert ctx.tokens in (before, after) and agrees(ctx)


def test_an_interrupt_that_lasts_is_not_hidden(models):
    """Where tokens have to be read again and that fails too, the next use tries once more."""
    with opened(models("llama"), {"n_swa": 6}) as ctx:
        before, failing = ctx.tokens, [True]

        def fail(*_):
            if failing[0]:
                raise Interrupt

        hook = models("llama").model.layers[1].register_forward_hook(fail)
        for attempt in (lambda: ctx.append(PROMPT[:8]), lambda: ctx.tokens, lambda: ctx.seen):
            with pytest.raises(Interrupt):
                attempt()
        failing[0] = False
        hook.remove()
        assert ctx.tokens == before and agrees(ctx)
