"""What a caller learns of a running context: how far a prompt is, how fast, and why it ended."""

import pytest
import torch

import saccade
from saccade.runtime import ContextParams, load_session, save_session
from saccade.runtime.session_file import SessionFile
from tests.tiny_models import tiny_config, tiny_model

PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"))


@pytest.mark.parametrize("n_batch", [1, 16, 40, 512])
def test_progress_follows_every_chunk(model, n_batch):
    seen = []
    with saccade.Context(model, ContextParams(n_batch=n_batch)) as ctx:
        ctx.append(PROMPT, on_progress=lambda *state: seen.append(state))
    ends = [*range(n_batch, 40, n_batch), 40]
    assert seen == [(end, 40) for end in ends]


@pytest.mark.parametrize("options", [{}, {"n_swa": 8, "n_sinks": 2},
                                     {"type_k": "int8", "type_v": "int8"},
                                     {"kv_policy": "snapkv", "kv_budget": 12}])  # fmt: skip
def test_a_callback_that_raises_leaves_what_was_read(model, options, tmp_path):
    """Reading on afterwards, or in a session, gives what one reading gives."""

    def stop(done, total):
        if done == 32:
            raise KeyboardInterrupt

    params = ContextParams(n_batch=16, **options)
    with saccade.Context(model, params) as ctx:
        whole = [each.token for each in ctx.stream(PROMPT, n_predict=6)]
    with saccade.Context(model, params) as ctx:
        with pytest.raises(KeyboardInterrupt):
            list(ctx.stream(PROMPT, on_progress=stop))
        assert ctx.tokens == PROMPT[:32] and ctx.next_token is None
        assert ctx.stats.prompt_tokens == 32 and ctx.finish_reason is None
        save_session(tmp_path / "s", ctx)
    with saccade.Context(model, params) as ctx:
        load_session(tmp_path / "s", ctx)
        assert [each.token for each in ctx.stream(PROMPT[32:], n_predict=6)] == whole


def test_why_a_stream_ended(model):
    with saccade.Context(model, ContextParams(n_ctx=44)) as ctx:
        stream = ctx.stream(PROMPT, n_predict=3)
        first = next(stream).token
        assert ctx.finish_reason is None
        assert len(list(stream)) == 2 and ctx.finish_reason == "length"
        list(ctx.stream(n_predict=50))
        assert ctx.finish_reason == "context" and ctx.seen == 44
    with saccade.Context(model) as ctx:
        assert not list(ctx.stream(PROMPT, stop=[first]))
        assert ctx.finish_reason == "stop"


def test_times_of_a_stream(model):
    with saccade.Context(model) as ctx:
        assert ctx.stats.ttft_seconds is None and ctx.stats.prefill_tps is None
        stream = ctx.stream(PROMPT, n_predict=4)
        next(stream)
        stats = ctx.stats
        first = stats.ttft_seconds
        assert first is not None and stats.prefill_seconds <= first
        list(stream)
        assert stats.ttft_seconds == first and stats.decode_tokens == 4
        assert stats.prefill_tps == pytest.approx(40 / stats.prefill_seconds)
        assert stats.decode_tps == pytest.approx(4 / stats.decode_seconds)


def test_a_session_carries_what_a_caller_adds(model, tmp_path):
    with saccade.Context(model) as ctx:
        ctx.append(torch.tensor(PROMPT))
        save_session(tmp_path / "s", ctx, extra={"said": ["hello"]})
        load_session(tmp_path / "s", ctx)
    assert SessionFile(tmp_path / "s").record["extra"] == {"said": ["hello"]}
