"""`saccade generate --session`: files that are saved although nobody reads on, or cannot be."""

from __future__ import annotations

import io
import sys

from saccade.cli import main
from saccade.core import BadInput
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model


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
