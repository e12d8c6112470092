"""`saccade chat`: a dialogue of any length, in constant memory."""

import io
import json
import os
import signal
import sys
import threading
import time

import pytest

from saccade.cli import chat, main
from saccade.cli.dialogue import Dialogue, endless
from saccade.cli.streaming import TextStream
from saccade.hf.context import Context
from saccade.hf.load import LoadedModel
from saccade.runtime import ContextParams, Sampler
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model

TRAINED = 160


@pytest.fixture(scope="module")
def loaded():
    model = tiny_model(tiny_config("llama"))
    return LoadedModel(model=model, tokenizer=Bytes("..."), name="tiny", n_ctx_train=TRAINED)


def dialogue(loaded, ctx, n_predict=8, system=None):
    return Dialogue(
        ctx=ctx, tokenizer=loaded.tokenizer,
        sampler=Sampler(temperature=1.0, seed=1), stop=set(), n_predict=n_predict, system=system,
    )  # fmt: skip


def say(talk, text):
    answer = list(talk.ask(text))
    talk.answered(Bytes().decode(answer, True))
    return answer


@pytest.mark.parametrize(
    "options",
    [{"n_swa": 24, "n_sinks": 4}, {"n_ctx": 100, "type_k": "int8", "type_v": "int8"},
     {"n_ctx": 100}],
)  # fmt: skip
def test_memory_stays_however_long_the_dialogue(loaded, options):
    params = ContextParams(n_batch=32, **options)
    with Context(loaded, params, reserve=params.n_ctx or 0) as ctx:
        talk = dialogue(loaded, ctx)
        say(talk, "hello")
        sizes, said = [ctx.cache_bytes], 0
        for number in range(40):
            said += len(say(talk, f"and number {number}?")) + 16
            sizes.append(ctx.cache_bytes)
            assert ctx.seen <= talk.ctx.n_ctx
        if params.type_k is None:
            assert len(set(sizes)) == 1
        else:  # room for the newest tokens comes and goes until their group of 64 is quantized
            rows, dim = 4 * 2, 16  # of four layers
            group = 64 * 2 * dim + 4 * (dim + 64)  # float16 scale and offset a channel, a token
            waiting = (64 + 8) * 2 * dim * 2
            assert max(sizes[20:]) == max(sizes[:20]) <= rows * (group + waiting)
        assert said > 3 * talk.ctx.n_ctx and talk.rereads >= 2


def test_a_compressed_dialogue_stays_within_its_budget(loaded):
    params = ContextParams(n_ctx=120, kv_policy="snapkv", kv_budget=16)
    with Context(loaded, params) as ctx:
        talk, sizes = dialogue(loaded, ctx), []
        for number in range(30):
            say(talk, f"and number {number}?")
            sizes.append(ctx.cache_bytes)
        slot = 4 * 2 * 2 * 16 * 4  # bytes of a token in four layers
        assert max(sizes) <= (16 + 64) * slot and talk.rereads >= 1


def test_a_dialogue_that_continues_equals_one_that_is_read_whole(loaded):
    """The next message is only the new part of the template; what was read stays."""
    with Context(loaded, ContextParams()) as ctx:
        talk = dialogue(loaded, ctx, n_predict=5)
        answer = bytes(say(talk, "hi"))
        say(talk, "so?")
        read = bytes(ctx.tokens)
    expected = b"<u>hi\n<a>" + answer + b"\n<u>so?\n<a>"
    assert read[: len(expected)] == expected and talk.rereads == 0


def test_what_is_read_again_are_the_latest_messages_and_the_system_text(loaded):
    with Context(loaded, ContextParams(n_ctx=100)) as ctx:
        talk = dialogue(loaded, ctx, system="be kind")
        for number in range(12):
            say(talk, f"message {number}")
        text = Bytes().decode(ctx.tokens, True)
    assert text.startswith("<s>be kind\n<u>message ") and "message 11" in text
    assert "message 2\n" not in text


def test_reset_and_a_message_that_is_too_long(loaded):
    with Context(loaded, ContextParams(n_ctx=60)) as ctx:
        talk = dialogue(loaded, ctx)
        first = say(talk, "hi")
        talk.reset()
        talk.sampler = Sampler(temperature=1.0, seed=1)
        assert ctx.seen == 0 and say(talk, "hi") == first


def test_memory_is_bounded_by_default():
    assert endless(ContextParams(), 8192) == ContextParams(n_swa=2048, n_sinks=4)
    assert endless(ContextParams(), 1000).n_swa == 500
    for options in ({"n_swa": 7}, {"n_ctx": 9}, {"type_k": "int8", "type_v": "int8"}):
        assert endless(ContextParams(**options), 8192) == ContextParams(**options)


@pytest.fixture
def call(loaded, monkeypatch, capsys):
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)

    def run(text, *words):
        stdin = io.StringIO(text)
        stdin.isatty = lambda: False
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main.main(["chat", "--model", "m", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_piped_lines_are_answered_one_by_one(call):
    code, out, said = call("hello\n\n  \nand?\n/memory\n/exit\nnever\n", "-n", "4")
    assert code == 0
    assert said.count("[cache 86.0 KiB") == 3, said  # two answers, and /memory
    assert out.endswith("\n")
    code, again, _ = call("hello\nand?\n", "-n", "4")
    assert code == 0 and again == out


def test_commands(call):
    code, out, said = call("/reset\n/what now\n/exit\n")
    assert code == 0 and out == ""
    assert "Forgotten." in said and "There is no command /what. /reset forgets" in said


def test_a_message_longer_than_the_context_is_refused_and_forgotten(call):
    code, _, said = call(f"{'x' * 90}\nhi\n", "-c", "60", "-n", "4")
    assert code == 0
    assert "do not fit into --ctx-size 60" in said and said.count("[cache") == 1


def test_ctrl_c_ends_the_answer_and_not_the_dialogue(call, monkeypatch):
    pushed, push = [], TextStream.push

    def press(stream, token):
        pushed.append(token)
        if len(pushed) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", press)
    code, _, said = call("hello\nand?\n", "-n", "6")
    assert code == 0 and said.count("[cache") == 2
    assert len(pushed) == 3 + 6


def test_live_on_a_terminal_asks_the_context_from_one_thread(call, monkeypatch):
    """A line drawn by another thread in the middle of a step would spoil the caches."""
    threads, push, line = set(), TextStream.push, chat.memory_line

    def slow(stream, token):
        time.sleep(0.2)
        return push(stream, token)

    def asked(dialogue):
        threads.add(threading.get_ident())
        return line(dialogue)

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(TextStream, "push", slow)
    monkeypatch.setattr(chat, "memory_line", asked)
    code, out, _ = call("hello\n", "-n", "3")
    assert code == 0 and "[cache 86.0 KiB" in out
    assert threads == {threading.get_ident()}


def test_a_dialogue_goes_on_in_another_process(call, tmp_path):
    """Two runs with a session give what one run gives."""
    path = ["--session", str(tmp_path / "c"), "-n", "4"]
    _, whole, _ = call("hello\nand?\n", "-n", "4")
    code, first, said = call("hello\n", *path)
    assert code == 0 and f"Saved {path[1]}" in said
    code, second, said = call("and?\n", *path)
    assert code == 0 and "Going on from" in said and first + second == whole
    code, _, said = call("x\n", *path, "--system", "be kind")
    assert code == 0 and "read again 1x" in said


def test_every_answer_is_in_the_session_before_the_next(call, monkeypatch, tmp_path):
    """A process that is killed later loses no answer that was finished."""
    found, ask = [], Dialogue.ask

    def look(dialogue, text, on_progress):
        found.append((tmp_path / "c").exists())
        return ask(dialogue, text, on_progress)

    monkeypatch.setattr(Dialogue, "ask", look)
    code, _, said = call("hello\nand?\n", "-n", "4", "--session", str(tmp_path / "c"))
    assert code == 0 and found == [False, True] and said.count("Saved") == 1


def test_a_session_of_generate_is_no_dialogue(call, tmp_path):
    words = ["generate", "-m", "m", "-p", "hi", "-n", "2", "--session", str(tmp_path / "s")]
    assert main.main(words) == 0
    code, _, said = call("hi\n", "--session", str(tmp_path / "s"))
    assert code == 2 and "is no dialogue: saccade generate saved it" in said


def test_a_session_that_has_no_window_goes_on_without_one(call, tmp_path):
    words = ["--session", str(tmp_path / "s"), "-n", "2", "--json", "-q"]
    assert call("hello\n", "-c", "120", *words)[0] == 0
    code, out, said = call("and?\n", *words)
    assert code == 0, said
    record = json.loads(out)
    assert record["n_ctx"] == 120 and "n_swa" not in record["options"]


def test_json_lines_and_quiet(call):
    _, plain, _ = call("hello\nand?\n", "-n", "4")
    code, out, said = call("hello\nand?\n", "-n", "4", "--quiet")
    assert code == 0 and out == plain and said == ""
    code, out, _ = call("hello\nand?\n", "-n", "4", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert "".join(record["text"] + "\n" for record in records) == plain
    assert [record["tokens"] for record in records] == [4, 4]
    assert {record["finish_reason"] for record in records} == {"length"}
    assert all(record["ttft_seconds"] > 0 for record in records)


def test_sigterm_ends_the_answer_and_the_dialogue(call, monkeypatch, tmp_path):
    pushed, push = [], TextStream.push

    def press(stream, token):
        pushed.append(token)
        if len(pushed) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", press)
    path = str(tmp_path / "c")
    code, _, said = call("hello\nand?\n", "-n", "6", "--session", path)
    assert code == 143 and len(pushed) == 3 and f"Saved {path}" in said
    monkeypatch.undo()


def test_a_message_that_was_not_read_to_its_end_is_forgotten(call, monkeypatch):
    ask = Dialogue.ask

    def pressed(dialogue, text, on_progress):
        def chunk(done, total):
            if done == 8:
                os.kill(os.getpid(), signal.SIGINT)
            on_progress(done, total)

        return ask(dialogue, text, chunk)

    with monkeypatch.context() as patched:
        patched.setattr(Dialogue, "ask", pressed)
        code, out, said = call("a longer message\n", "-n", "4", "-b", "8")
    assert code == 0 and out == "" and "was not read to its end, say it again" in said


def test_refusals(call, loaded, monkeypatch):
    code, _, said = call("", "--n-predict", "0")
    assert code == 2 and "at least 1, got '0'" in said
    nameless = LoadedModel(model=loaded.model, tokenizer=None, name="tiny", n_ctx_train=TRAINED)
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: nameless)
    code, _, said = call("hi\n")
    assert code == 2 and "tiny has no tokenizer that can be read" in said


@pytest.mark.real_model
def test_a_short_exchange_with_the_real_model(monkeypatch, capsys):
    stdin = io.StringIO("What is the capital of France? Answer in one word.\nAnd of Italy?\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main.main(["chat", "--model", "smollm2", "-n", "16"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()[:2]
    assert "Paris" in first and "Rome" in second, captured.out
    sizes = [line.split(",")[0] for line in captured.err.splitlines() if line.startswith("[cache")]
    assert len(sizes) == 2 and sizes[0] == sizes[1]
