"""What comes next is read behind what was read last, however streams, appends and others mix."""

import os
import random

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.runtime import ContextParams
from saccade.runtime.session import load_session, save_session
from tests.tiny_models import tiny_config, tiny_model

COUNT = int(os.environ.get("SACCADE_FUZZ", "3"))
"""Random sequences of operations of each kind of cache."""
PROMPT = list(range(3, 23))
MORE = [90, 91, 92]
KINDS = {
    "dense": {},
    "ring": {"n_swa": 6, "n_sinks": 2},
    "paged": {"page_size": 8},
    "offloaded": {"offload_kqv": False},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama", num_hidden_layers=2))


def greedy(model, tokens, count, **options):
    """What a new context that reads all the tokens at once generates behind them."""
    with saccade.Context(model, ContextParams(**options)) as ctx:
        return shown(ctx, count, tokens)


def shown(ctx, count, prompt=()):
    return [each.token for each in ctx.stream(prompt, n_predict=count)]


def test_append_reads_the_shown_token_first_and_drops_the_chosen_one(model):
    with saccade.Context(model) as ctx:
        stream = ctx.stream(PROMPT, n_predict=9)
        first = [next(stream).token, next(stream).token]
        assert ctx.next_token == (first[1], True)
        ctx.append(MORE)
        text = PROMPT + first + MORE
        assert ctx.tokens == text and ctx.next_token is None
        shown(ctx, 2)
        assert ctx.next_token is not None and not ctx.next_token.shown
        dropped = ctx.tokens
        ctx.append(MORE)
        assert ctx.tokens == dropped + MORE


def test_a_stream_goes_on_behind_appended_tokens(model):
    with saccade.Context(model) as ctx:
        shown(ctx, 3, PROMPT)
        ctx.append(MORE)
        assert shown(ctx, 4) == greedy(model, ctx.tokens[: len(PROMPT) + 6], 4)


def test_a_stream_that_was_paused_goes_on_behind_what_others_read(model):
    with saccade.Context(model) as ctx:
        one, two = ctx.stream(PROMPT, n_predict=9), ctx.stream(n_predict=9)
        tokens = [next(one).token, next(two).token, next(one).token, next(two).token]
        assert tokens == greedy(model, PROMPT, 4)
        ctx.append(MORE)
        assert next(one).token == greedy(model, ctx.tokens, 1)[0]
        ctx.reset()
        with pytest.raises(BadInput, match="nothing to continue from"):
            next(two)


def test_append_returns_the_states_of_its_own_tokens(model):
    with saccade.Context(model) as ctx:
        next(iter(ctx.stream(PROMPT, n_predict=9)))
        assert ctx.append(MORE, wanted=9).shape == (3, 64)


def test_a_session_saved_after_append_goes_on_behind_it(model, tmp_path):
    with saccade.Context(model) as ctx:
        ctx.append(PROMPT)
        save_session(tmp_path / "s", ctx)
    with saccade.Context(model) as ctx:
        load_session(tmp_path / "s", ctx)
        assert shown(ctx, 4) == greedy(model, PROMPT, 4)


def operations(ctx, path, chance):
    """One random operation, and what the text is afterwards."""
    waiting = [ctx.next_token.token] if ctx.next_token and ctx.next_token.shown else []
    before, new = ctx.tokens, [chance.randrange(3, 120) for _ in range(chance.randrange(1, 12))]
    kind = chance.randrange(6)
    if kind == 0:
        ctx.append(new)
        return before + waiting + new
    if kind == 1:
        stream = ctx.stream(new, n_predict=9)
        found = [next(stream).token for _ in range(chance.randrange(1, 4))]
        return before + waiting + new + found[:-1]
    if kind == 2 and (before or waiting):
        cut = chance.randrange(len(before) + 1)
        kept = ctx.reuse([*before[:cut], *new])
        return before[:kept]
    if kind == 3:
        ctx.reset()
        return []
    if kind == 4:
        save_session(path, ctx)
        ctx.append(new)
        load_session(path, ctx)
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_random_operations_leave_what_a_new_context_would_have(model, tmp_path, kind):
    chance = random.Random(kind)
    for _ in range(COUNT):
        params = ContextParams(n_batch=chance.choice((1, 5, 64)), **KINDS[kind])
        with saccade.Context(model, params) as ctx:
            for _ in range(8):
                expected = operations(ctx, tmp_path / "s", chance)
                assert ctx.tokens == expected
                assert {layer.seen for layer in ctx.cache.stores} == {len(expected)}
            ctx.append(MORE)
            ours = ctx.logits(ctx.append([9]))
            text = ctx.tokens
        with saccade.Context(model, ContextParams(**KINDS[kind])) as ctx:
            assert torch.allclose(ours, ctx.logits(ctx.append(text)), atol=2e-5)
