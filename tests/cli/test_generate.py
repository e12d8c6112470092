"""`saccade generate`: options, the prompt, and streamed text."""

from __future__ import annotations

import io
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from saccade.cli import generate, main, shared_options, tokens
from saccade.cli.failure import UsageError
from saccade.cli.streaming import TextStream
from saccade.core import BadInput
from saccade.runtime import Stats
from saccade.runtime import params as runtime_params
from saccade.runtime.params import ContextParams
from saccade.sparse import PATTERNS
from tests.cli.byte_tokenizer import Bytes
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model


def params(*words):
    found = main.parse(["generate", "--model", "m", "--prompt", "p", *words]).params
    return shared_options.context_params({o.field: found[o.field] for o in shared_options.CONTEXT})


def test_every_field_has_an_option():
    names = [option.field for option in shared_options.CONTEXT]
    assert len(set(names)) == len(names)
    assert set(names) - {"rope_scale"} == {f.name for f in fields(ContextParams)}


def test_choices_are_those_of_context_params():
    choices = {o.field: o.choices for o in shared_options.CONTEXT if o.choices}
    assert choices == {
        "flash_attn": runtime_params.FLASH_ATTN,
        "type_k": runtime_params.CACHE_TYPES,
        "type_v": runtime_params.CACHE_TYPES,
        "rope_scaling_type": runtime_params.ROPE_SCALING_TYPES,
        "sparse": tuple(PATTERNS),
    }


def test_nothing_given_is_the_default():
    assert params() == ContextParams()


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("-c 4096", "n_ctx", 4096),
        ("--ctx-size=4096", "n_ctx", 4096),
        ("-b 64", "n_batch", 64),
        ("-fa on", "flash_attn", "enabled"),
        ("--flash-attn off", "flash_attn", "disabled"),
        ("--flash-attn auto", "flash_attn", "auto"),
        ("-ctk int8 -ctv int8", "type_v", "int8"),
        ("--rope-scale 4", "rope_freq_scale", 0.25),
        ("--rope-freq-scale 0.5", "rope_freq_scale", 0.5),
        ("--rope-freq-base 1e6", "rope_freq_base", 1e6),
        ("--yarn-orig-ctx 8192", "yarn_orig_ctx", 8192),
        ("--kv-offload off", "offload_kqv", False),
        ("--keep 0", "n_keep", 0),
        ("--sparse strided", "sparse", PATTERNS["strided"]()),
        ("--kv-policy snapkv --kv-budget 512", "kv_budget", 512),
        ("--kv-policy snapkv --kv-budget 0.25", "kv_budget", 0.25),
        ("--kv-policy snapkv --kv-budget 25%", "kv_budget", 0.25),
    ],
)
def test_options_become_params(words, field, value):
    found = getattr(params(*words.split()), field)
    assert found == value and type(found) is type(value)


def test_rope_scale_given_twice():
    with pytest.raises(UsageError, match="say the same thing"):
        params("--rope-scale", "2", "--rope-freq-scale", "0.5")


def test_messages_name_options_instead_of_fields():
    said = shared_options.with_flags("n_ctx=20 is full: set a window (n_swa), or my_n_ctx. sparse")
    assert said == "--ctx-size=20 is full: set a window (--swa), or my_n_ctx. sparse"


def test_prompt_from_a_file_and_from_stdin(tmp_path, monkeypatch):
    path = tmp_path / "p.txt"
    path.write_text("Überall")
    assert generate.read_prompt(None, str(path)) == "Überall"
    stdin = SimpleNamespace(buffer=io.BytesIO("späť".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate.read_prompt(None, "-") == "späť"
    path.write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match="is not UTF-8 text \\(at byte 2\\)"):
        generate.read_prompt(None, str(path))


def test_chat_template_unless_raw():
    notes = ["another.", "no tokenizer could be read: it is cut."]
    loaded = SimpleNamespace(tokenizer=Bytes(), name="m", notes=notes)
    assert bytes(generate.encode(loaded, "hi", raw=False)) == b"hi"
    loaded.tokenizer.chat_template = "..."
    assert bytes(generate.encode(loaded, "hi", raw=False)) == b"<u>hi\n<a>"
    assert bytes(generate.encode(loaded, "hi", raw=True)) == b"hi"
    loaded.tokenizer = None
    with pytest.raises(UsageError, match=r"m has no tokenizer.*\(no tokenizer .* it is cut\.\)"):
        generate.encode(loaded, "hi", raw=False)


def test_end_tokens_come_from_both_places():
    config = SimpleNamespace(eos_token_id=[7, 8])
    loaded = SimpleNamespace(
        model=SimpleNamespace(generation_config=config), tokenizer=SimpleNamespace(eos_token_id=2)
    )
    assert tokens.end_tokens(loaded) == {2, 7, 8}
    loaded.model.generation_config = None
    loaded.tokenizer.eos_token_id = None
    assert tokens.end_tokens(loaded) == set()


class Echo:
    """A context that writes back what it reads."""

    def __init__(self, loaded, params):
        self.params, self.stats = params, Stats()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stream(self, prompt, *, n_predict, sampler, stop):
        if self.params.n_ctx is not None:
            raise BadInput(f"{len(prompt)} tokens do not fit into n_ctx={self.params.n_ctx}.")
        self.stats.prompt_tokens, self.stats.prefill_seconds = len(prompt), 1.0
        for token in prompt[:n_predict]:
            self.stats.decode_tokens += 1
            if self.stats.decode_tokens == 5:
                raise KeyboardInterrupt
            yield SimpleNamespace(token=token)


@pytest.fixture
def echo(stand_in):
    config = SimpleNamespace(generation_config=None)
    loaded = SimpleNamespace(
        model=config, tokenizer=Bytes(), name="m", n_ctx_train=8, notes=["it was guessed."]
    )
    stand_in("saccade.hf.load", load_model=lambda *_, **__: loaded)
    stand_in("saccade.hf.context", Context=Echo)


def test_text_goes_to_stdout_and_numbers_to_stderr(capsys, echo):
    assert main.main(["generate", "--model", "m", "--prompt", "čau", "-n", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ča\n"
    assert captured.err.endswith("[4 prompt tokens at 4.00 tokens/s; 3 more tokens; cache 0 B]\n")
    assert "Note: it was guessed.\n" in captured.err


def test_errors_of_the_context_name_options(capsys, echo):
    assert main.main(["generate", "--model", "m", "--prompt", "hello", "-c", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("saccade: 5 tokens do not fit into --ctx-size=2.\n")


def test_ctrl_c_keeps_what_was_written(capsys, echo):
    assert main.main(["generate", "--model", "m", "--prompt", "hello world"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "hell\n"
    assert captured.err.endswith("cache 0 B]\nStopped.\n")


def test_stats_line():
    stats = Stats(prompt_tokens=1000, prefill_seconds=2, decode_tokens=10, decode_seconds=1)
    said = generate.stats_line(stats)
    assert (
        said == "[1,000 prompt tokens at 500 tokens/s; 10 more tokens at 10.0 tokens/s; cache 0 B]"
    )
    assert "tokens/s" not in generate.stats_line(Stats(prompt_tokens=1))


class TestSession:
    """The command line with a tiny model in place of a real one."""

    @pytest.fixture
    def tiny(self, monkeypatch):
        from saccade.hf.load import LoadedModel
        from tests.tiny_models import tiny_config, tiny_model

        model = tiny_model(tiny_config("llama"))
        loaded = LoadedModel(model=model, tokenizer=Bytes(), name="tiny", n_ctx_train=512)
        monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)

    def call(self, capsys, *words):
        code = main.main(["generate", "--model", "m", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_two_parts_give_what_one_run_gives(self, capsys, tmp_path, tiny):
        options = ["--temp", "1", "--seed", "3"]
        _, whole, _ = self.call(capsys, "-p", "Why?", "-n", "12", *options)
        path = str(tmp_path / "s")
        code, first, said = self.call(capsys, "-p", "Why?", "-n", "5", "--session", path, *options)
        assert code == 0 and f"Saved {path}: 9 tokens." in said
        code, second, said = self.call(capsys, "-n", "7", "--session", path)
        assert code == 0 and f"Going on from {path}: 9 tokens." in said
        assert first[:-1] + second == whole
        code, _, said = self.call(capsys, "-n", "3", "-p", "And?", "--session", path)
        assert code == 0 and "Saved" in said and "23 tokens" in said

    def test_refusals(self, capsys, tmp_path, tiny):
        path = tmp_path / "s"
        code, _, said = self.call(capsys, "--session", str(path))
        assert code == 2 and "except to go on with a --session that exists" in said
        path.write_text("something else")
        code, out, said = self.call(capsys, "--session", str(path), "-p", "x")
        assert code == 2 and out == "" and "is not a complete session" in said
        assert path.read_text() == "something else"
        path.unlink()
        self.call(capsys, "--session", str(path), "-p", "x", "-n", "2")
        code, _, said = self.call(capsys, "--session", str(path), "-p", "x", "--swa", "9")
        assert code == 2 and "was saved with --swa=None, this context has 9" in said
        code, _, said = self.call(capsys, "--session", str(tmp_path / "no" / "s"), "-p", "x")
        assert code == 2 and "there is no folder" in said

    def test_ctrl_c_saves_between_two_tokens(self, capsys, tmp_path, tiny, monkeypatch):
        import os
        import signal

        _, whole, _ = self.call(capsys, "-p", "Why?", "-n", "12")
        path, pushed = str(tmp_path / "s"), []
        push = TextStream.push

        def press(stream, token):
            pushed.append(token)
            if len(pushed) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return push(stream, token)

        monkeypatch.setattr(TextStream, "push", press)
        code, first, said = self.call(capsys, "-p", "Why?", "-n", "12", "--session", path)
        assert code == 130 and f"Saved {path}" in said and said.endswith("Stopped.\n")
        assert len(pushed) == 4
        monkeypatch.undo()
        self.tiny_again(monkeypatch)
        _, second, _ = self.call(capsys, "-n", "8", "--session", path)
        assert first[:-1] + second == whole

    def tiny_again(self, monkeypatch):
        TestSession.tiny.__wrapped__(self, monkeypatch)


def test_the_next_message_begins_behind_the_answer():
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages, **_: (
            "".join(f"<{m['role']}>{m['content']}<end>" for m in messages) + "<assistant>"
        )
    )
    assert tokens.next_message(tokenizer, "hi") == "<end><user>hi<end><assistant>"


def test_a_session_is_saved_when_the_reader_of_the_text_leaves(tmp_path, monkeypatch, capsys):
    """`saccade generate ... | head`: what was written stays, although nobody reads on."""
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    line = ["generate", "-m", str(path), "-p", "t1", "-n", "9", "--session", str(tmp_path / "s")]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        assert main.main(line) == 141
    assert "Saved" in capsys.readouterr().err
    assert main.main(line) == 0 and "Going on from" in capsys.readouterr().err


def test_a_session_that_cannot_be_saved_is_refused_before_the_prompt(tmp_path, monkeypatch, capsys):
    from saccade import runtime

    def refuse(path, ctx, sampler=None):
        raise BadInput("its keys cannot be named.")

    path = tmp_path / "m.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")
    monkeypatch.setattr(runtime, "save_session", refuse)
    line = ["generate", "-m", str(path), "-p", "t1", "-n", "2", "--session", str(tmp_path / "s")]
    assert main.main(line) == 2
    shown = capsys.readouterr()
    assert "saccade: --session cannot be saved later: its keys cannot be named." in shown.err
    assert shown.out == "" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_prompt_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(generate, "_LONGEST", 1000)
    with pytest.raises(UsageError, match="/dev/zero has no end within"):
        generate.read_prompt(None, "/dev/zero")
