"""`saccade generate`: options, the prompt, and streamed text."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

import saccade
from saccade.cli import generate, main, shared_options, texts, tokens
from saccade.cli.failure import UsageError
from saccade.cli.streaming import TextStream
from saccade.cli.writing import Writing
from saccade.hf import check_store
from saccade.hf.load import LoadedModel
from saccade.runtime import params as runtime_params
from saccade.runtime.params import ContextParams
from saccade.sparse import PATTERNS
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model


def params(*words):
    found = main.parse(["generate", "--model", "m", "--prompt", "p", *words]).params
    return shared_options.context_params({o.field: found[o.field] for o in shared_options.CONTEXT})


def test_every_field_has_an_option():
    names = [option.field for option in shared_options.CONTEXT]
    assert len(set(names)) == len(names)
    assert set(names) - {"rope_scale", "sparse_plan"} == {f.name for f in fields(ContextParams)}


def test_choices_are_those_of_context_params():
    choices = {o.field: o.choices for o in shared_options.CONTEXT if o.choices}
    assert choices == {
        "flash_attn": runtime_params.FLASH_ATTN,
        "type_k": runtime_params.CACHE_TYPES,
        "type_v": runtime_params.CACHE_TYPES,
        "rope_scaling_type": runtime_params.ROPE_SCALING_TYPES,
        "sparse": (*PATTERNS, shared_options.AUTO),
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
        ("--sparse quest --draft 4", "n_draft", 4),
        ("--sparse quest --draft-max 8", "n_draft", 8),
        ("--kv-policy snapkv --kv-budget 512", "kv_budget", 512),
        ("--kv-policy snapkv --kv-budget 0.25", "kv_budget", 0.25),
        ("--kv-policy snapkv --kv-budget 25%", "kv_budget", 0.25),
        ("--kv-policy snapkv --kv-budget 1.5GiB", "kv_budget", saccade.Bytes(3 << 29)),
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
    assert said == "--ctx-size 20 is full: set a window (--swa), or my_n_ctx. sparse"
    said = shared_options.with_flags(
        "type_k='int8', n_ctx=1,024, offload_kqv=False; backend='sdpa'"
    )
    assert said == "--cache-type-k int8, --ctx-size 1024, --kv-offload off; --backend sdpa"
    said = shared_options.with_flags("Set n_ctx or rope_freq_scale; leave yarn_* unset.")
    assert said == "Set --ctx-size or --rope-scale; leave --yarn-* unset."


def test_a_backend_that_has_the_name_of_an_option_keeps_it():
    with pytest.raises(UsageError, match=r"unknown backend 'auto'; .* fa4, flash_attn, "):
        params("--backend", "auto")


def test_messages_name_the_option_that_was_typed():
    typed = {"rope_scale": 4.0}
    said = shared_options.with_flags("rope_freq_scale=0.5, not 0.25: rope_freq_scale", typed)
    assert said == "--rope-scale 2, not 0.25: --rope-scale"
    assert shared_options.with_flags("rope_freq_scale=0.25") == "--rope-scale 4"
    typed = {"rope_freq_scale": 0.5}
    said = shared_options.with_flags("rope_freq_scale=0.5: rope_freq_scale", typed)
    assert said == "--rope-freq-scale 0.5: --rope-freq-scale"


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


@pytest.fixture
def tiny(monkeypatch):
    model = tiny_model(tiny_config("llama"))
    loaded = LoadedModel(
        model=model, tokenizer=Bytes(), name="tiny", n_ctx_train=512, notes=["it was guessed."]
    )
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)


def call(capsys, *words):
    code = main.main(["generate", "--model", "m", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text_goes_to_stdout_and_numbers_to_stderr(capsys, monkeypatch, tmp_path, tiny):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check_store, "_passed", set())  # nothing was checked before
    code, out, err = call(capsys, "--prompt", "hello", "-n", "3")
    assert code == 0 and len(out.encode()) == 4 and out.endswith("\n")
    begin = "Loading m ...\nNote: it was guessed.\n"
    assert err.startswith(f"{begin}Checking once that the model gives the same here as by its own ")
    numbers = r"tokens/s; first token after [\d.,]+ s; 3 tokens written at [\d.,]+ tokens/s; cache "
    assert re.search(numbers + r"[\d.]+ KiB; cpu, float32\]\nEnded at --n-predict 3: ", err), err
    _, _, err = call(capsys, "--prompt", "hello", "-n", "3")
    assert err.startswith(f"{begin}[5 prompt tokens at ")


def test_quiet_is_the_text_alone(capsys, tiny):
    _, whole, _ = call(capsys, "--prompt", "hello", "-n", "3")
    code, out, err = call(capsys, "--prompt", "hello", "-n", "3", "--quiet")
    assert code == 0 and out == whole and err == ""


def test_json_has_the_text_and_what_it_took(capsys, tiny):
    _, text, _ = call(capsys, "-p", "hello", "-n", "3", "--temp", "1", "--seed", "4")
    words = ["-p", "hello", "-n", "3", "--temp", "1", "--seed", "4", "--json", "--cache-type-k"]
    code, out, _ = call(capsys, *words, "int8", "-ctv", "int8", "--kv-offload", "on")
    record = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    plain = json.loads(call(capsys, *words[:-1])[1])
    assert plain["text"] + "\n" == text
    assert plain["finish_reason"] == "length" and plain["tokens"] == 3
    assert plain["prompt_tokens"] == 5 and plain["context_tokens"] == 8
    rates = [plain[name] for name in ("ttft_seconds", "prefill_tps", "decode_tps", "cache_bytes")]
    assert all(value > 0 for value in rates)
    assert (plain["model"], plain["device"], plain["dtype"]) == ("tiny", "cpu", "float32")
    assert plain["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 4}
    assert plain["notes"] == ["it was guessed."] and plain["options"] == {}
    assert record["options"] == {"type_k": "int8", "type_v": "int8"}


def test_a_full_context_says_how_much_was_written_and_what_to_do(capsys, tiny):
    """A caller must not take text that was cut off for a short answer."""
    code, out, err = call(capsys, "-p", "hello", "-c", "16", "-n", "200")
    assert code == 0 and len(out) == 13
    assert "Ended after 12 of 200 tokens, because the context of 16 tokens is full. Raise " in err
    record = json.loads(call(capsys, "-p", "hello", "-c", "16", "-n", "200", "--json")[1])
    assert record["finish_reason"] == "context" and record["n_ctx"] == 16
    code, out, _ = call(capsys, "-p", "hello", "-c", "16", "-n", "40", "--keep", "4")
    assert code == 0 and len(out) == 41


def test_an_end_token_ends_the_answer(capsys, tiny, monkeypatch):
    first = json.loads(call(capsys, "-p", "hello", "-n", "1", "--json")[1])["text"]
    monkeypatch.setattr(generate, "end_tokens", lambda _: {ord(first)})
    code, out, err = call(capsys, "-p", "hello", "-n", "9")
    assert code == 0 and out == "" and "Ended: the model ended its answer.\n" in err


def test_a_prompt_that_is_too_long_is_refused_before_a_context_is_opened(capsys, tiny):
    code, out, err = call(capsys, "--prompt", "hello", "-c", "2")
    assert code == 2 and out == ""
    assert "saccade: the prompt has about 5 tokens, but 2 fit (--ctx-size 2). Give a " in err


def test_ctrl_c_without_a_session_keeps_what_was_written(capsys, tiny, monkeypatch):
    _, whole, _ = call(capsys, "-p", "hello", "-n", "9")
    press_at(monkeypatch, 4, signal.SIGINT)
    code, out, err = call(capsys, "-p", "hello", "-n", "9")
    assert code == 130 and out[:-1] == whole[: len(out) - 1] and len(out) in (4, 5)
    assert "tokens written" in err and err.endswith("Stopped.\n")


def press_at(monkeypatch, count, number):
    """Send a signal while that token is shown."""
    pushed, push = [], TextStream.push

    def press(stream, token):
        pushed.append(token)
        if len(pushed) == count:
            os.kill(os.getpid(), number)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", press)
    return pushed


class TestSession:
    """The command line with a tiny model in place of a real one."""

    call = staticmethod(call)

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
        assert code == 2 and "was saved with no --swa, this context has --swa 9" in said
        code, _, said = self.call(capsys, "--session", str(tmp_path / "no" / "s"), "-p", "x")
        assert code == 2 and "there is no folder" in said

    @pytest.mark.parametrize(("number", "exit"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_saves_between_two_tokens(self, capsys, tmp_path, tiny, number, exit):
        _, whole, _ = self.call(capsys, "-p", "Why?", "-n", "12")
        path = str(tmp_path / "s")
        with pytest.MonkeyPatch.context() as patched:
            pushed = press_at(patched, 4, number)
            code, first, said = self.call(capsys, "-p", "Why?", "-n", "12", "--session", path)
        assert code == exit and f"Saved {path}" in said and said.endswith("Stopped.\n")
        assert len(pushed) == 4
        _, second, _ = self.call(capsys, "-n", "8", "--session", path)
        assert first[:-1] + second == whole

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_in_the_prompt_saves_what_was_read(
        self, capsys, tmp_path, tiny, monkeypatch, number
    ):
        """The same prompt again reads the rest, and gives what one run gives."""
        prompt = "Why is it that the sky is blue?"
        words, path = ["-p", prompt, "-n", "6", "-b", "8"], str(tmp_path / "s")
        _, whole, _ = self.call(capsys, *words)
        with monkeypatch.context() as patched:
            kill_in_prompt(patched, 16, number)
            code, out, said = self.call(capsys, *words, "--session", path)
        assert code == 128 + number and out == ""
        assert f"16 of the {len(prompt)} tokens of the prompt are in {path}. Give the same" in said
        code, out, said = self.call(capsys, *words, "--session", path)
        assert code == 0 and out == whole and f"[{len(prompt) - 16} prompt tokens" in said

    def test_a_signal_in_a_later_prompt_saves_what_was_read(self, capsys, tmp_path, tiny):
        options, second = ["-n", "4", "-b", "8"], ["-p", "And how is the sea then, my friend?"]
        outs = []
        for name in ("whole", "cut"):
            path = ["--session", str(tmp_path / name)]
            self.call(capsys, "-p", "Why?", *options, *path)
            if name == "cut":
                with pytest.MonkeyPatch.context() as patched:
                    kill_in_prompt(patched, 16, signal.SIGTERM)
                    code, _, said = self.call(capsys, *second, *options, *path)
                assert code == 143 and "16 of the 35 tokens of the prompt are in" in said
            code, out, said = self.call(capsys, *second, *options, *path)
            assert code == 0
            outs.append(out)
        assert outs[0] == outs[1] and "[19 prompt tokens" in said

    def test_another_prompt_behind_one_that_was_cut_off_is_said(self, capsys, tmp_path, tiny):
        path = ["--session", str(tmp_path / "s"), "-b", "8", "-n", "2"]
        with pytest.MonkeyPatch.context() as patched:
            kill_in_prompt(patched, 8, signal.SIGINT)
            self.call(capsys, "-p", "a prompt of some length", *path)
        code, _, said = self.call(capsys, "-p", "something else", *path)
        assert code == 0 and "Note: the session ends inside a prompt; this one is read" in said

    def test_a_second_signal_stops_at_once_and_keeps_the_old_file(self, capsys, tmp_path, tiny):
        path = tmp_path / "s"
        words = ["-p", "Why is it so?", "-n", "4", "-b", "2", "--session", str(path)]
        with pytest.MonkeyPatch.context() as patched:
            kill_in_prompt(patched, 4, signal.SIGTERM, signal.SIGTERM)
            code, _, said = self.call(capsys, *words)
        assert code == 143 and not path.exists() and "was not written" in said
        self.call(capsys, *words)
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patched:
            kill_in_prompt(patched, 4, signal.SIGINT, signal.SIGINT)
            code, _, said = self.call(capsys, *words)
        assert code == 130 and path.read_bytes() == before and "is as it was" in said

    def test_a_signal_while_saving_waits_for_the_whole_file(self, capsys, tmp_path, tiny):
        from saccade.runtime import session_file

        path, write = str(tmp_path / "s"), session_file.os.fsync

        def pressed(handle):
            os.kill(os.getpid(), signal.SIGTERM)
            write(handle)

        words = ["-p", "Why?", "-n", "4", "--session", path]
        with pytest.MonkeyPatch.context() as patched:
            self.call(capsys, *words)
            patched.setattr(session_file.os, "fsync", pressed)
            patched.setattr(session_file, "_sync_folder", lambda _: None)
            code, _, said = self.call(capsys, *words)
        assert code == 143 and "Saved" in said
        code, _, said = self.call(capsys, "-n", "1", "--session", path)
        assert code == 0 and "Going on from" in said


def kill_in_prompt(monkeypatch, at, *numbers):
    """Send signals once so many tokens of a prompt are read."""
    show = Writing._stream

    def patched(writing, deferred):
        on_chunk = deferred.on_chunk

        def pressed(done, total):
            if done == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
            on_chunk(done, total)

        deferred.on_chunk = pressed
        return show(writing, deferred)

    monkeypatch.setattr(Writing, "_stream", patched)


def test_the_next_message_begins_behind_the_answer():
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages, **_: (
            "".join(f"<{m['role']}>{m['content']}<end>" for m in messages) + "<assistant>"
        )
    )
    assert tokens.next_message(tokenizer, "hi") == "<end><user>hi<end><assistant>"


def test_a_prompt_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(texts, "_LONGEST", 1000)
    with pytest.raises(UsageError, match="/dev/zero has no end within"):
        generate.read_prompt(None, "/dev/zero")
