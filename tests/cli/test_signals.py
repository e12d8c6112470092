"""Real signals to a real process: prompt, answer, saving; the newest whole session is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from saccade.cli import main
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

PROMPT = " ".join(f"t{n % 30}" for n in range(60))
SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
from saccade.cli import writing
from saccade.cli.main import main
from saccade.runtime import session_file
from saccade.runtime.cached_text import CachedText

waits, begun = {sys.argv[1]}, []

def at(place):  # tell the test where we are, and be slow enough for its signal
    if place == "begin":
        begun.append(place)
    elif place in waits and begun:  # the self-check of a model reads chunks before
        waits.clear()
        os.write(1, b"@")
        time.sleep(0.5)

def before(owner, name, place):
    original = getattr(owner, name)
    def slow(*args, **kwargs):
        at(place)
        return original(*args, **kwargs)
    setattr(owner, name, slow)

before(writing.Writing, "run", "begin")
before(CachedText, "_read_chunk", "prompt")
before(writing.TextStream, "push", "answer")
before(session_file.os, "fsync", "save")
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")
    return path


def stopped(number, where, *words):
    """Run the command in a process that is sent a signal -> (exit code, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, where, *map(str, words)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.stdout.read(1) != b"@":  # at the first place, which may be an earlier chunk
        assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGTERM, "prompt"), (signal.SIGINT, "answer")],
)
def test_a_stop_at_any_moment_leaves_a_session_that_goes_on(model, tmp_path, capsys, number, where):
    words = ["generate", "-m", str(model), "-p", PROMPT, "-n", "8", "-b", "16"]
    assert main.main([*words, "-q"]) == 0
    whole = capsys.readouterr().out
    line = [*words, "--session", str(tmp_path / "s")]
    code, said = stopped(number, where, *line)
    assert code == 128 + number and "Saved" in said and said.endswith("Stopped.\n"), said
    if where == "prompt":
        assert re.search(r"16 of the \d+ tokens of the prompt are in .*Give the same prompt", said)
        assert main.main([*line, "-q"]) == 0
        assert capsys.readouterr().out == whole
    else:
        assert main.main([*line[:3], "-n", "7", "-b", "16", *line[-2:], "-q"]) == 0
        assert whole.endswith(capsys.readouterr().out)


def test_a_stop_while_saving_leaves_the_new_file_whole(model, tmp_path, capsys):
    path = tmp_path / "s"
    line = ["generate", "-m", str(model), "--session", str(path), "-n", "4"]
    assert main.main([*line, "-p", "t1 t2", "-q"]) == 0
    first = path.read_bytes()
    code, said = stopped(signal.SIGTERM, "save", *line)
    assert code == 143 and "Saved" in said
    second = path.read_bytes()
    assert second != first and main.main([*line, "-q"]) == 0


def test_chat_keeps_its_dialogue(model, tmp_path):
    line = ["chat", "-m", str(model), "--session", str(tmp_path / "c"), "-n", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "saccade", *line],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    while b"[cache" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # it waits for the next message
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Saved" in said and (tmp_path / "c").exists()
