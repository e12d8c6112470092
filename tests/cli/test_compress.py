"""`saccade compress`: a shorter text on stdout and nothing else, cost on stderr, one sentence."""

from __future__ import annotations

import io
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

import saccade
from saccade.cli import main
from saccade.cli.stopping import Stopped
from saccade.core import BadInput
from saccade.hf.load import LoadedModel
from saccade.runtime.importance import self_information
from tests.cli.byte_tokenizer import Bytes, backend
from tests.tiny_models import tiny_config, tiny_model

TEXT = "The first one. A naïve 🙂 sentence! Code 4711 is kept.\nIs this the last? Yes.\n" * 2


@pytest.fixture(scope="module")
def loaded():
    made = backend()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    model = tiny_model(tiny_config("llama", vocab_size=288))
    return LoadedModel(model=model, tokenizer=tokenizer, name="tiny", n_ctx_train=512, notes=[])


@pytest.fixture
def call(loaded, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)
    (tmp_path / "t.txt").write_text(TEXT)

    def run(*words, file=None):
        code = main.main(["compress", file or str(tmp_path / "t.txt"), "-m", "m", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def is_part(short, text):
    """Whether the characters of `short` are some of those of `text`, in their order."""
    rest = iter(text)
    return all(character in rest for character in short)


@pytest.mark.parametrize(
    "words",
    [
        "--score self_information",
        "--question one? --score contrastive --window 60 --overlap 9",
        "--question one? --unit chunk",
        "--unit sentence --protect 47\\d+",
        "--unit token --protect numbers --protect naïve",
    ],
)
def test_at_most_so_many_tokens_in_their_order(call, loaded, words):
    code, out, err = call("--to", "100", *words.split())
    assert code == 0 and is_part(out, TEXT) and "\ufffd" not in out
    assert 1 <= len(out.encode()) <= 100  # its tokens are bytes
    if "--protect" in words:
        assert out.count("4711") == 2
    if "sentence" in words:
        assert out.count("Code 4711 is kept.\n") == 2
    cost = rf"^162 -> {len(out.encode())} tokens \(\d+%\); scoring read [\d,]+ tokens.* tokens/s$"
    assert re.search(cost, err, re.MULTILINE), err


def test_stdin_to_stdout_is_the_library_s_text(call, loaded, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(TEXT.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, err = call("--to", "64", "--quiet", file="-")
    found = saccade.compress_text(loaded, TEXT, 64)
    assert (code, err) == (0, "") and out == found.text
    assert found.tokens == len(out.encode()) and found.tokens_before == len(TEXT.encode())
    assert found.kept.tolist() == sorted(set(found.kept.tolist()))


def test_tokens_are_those_of_the_highest_scores(loaded):
    text = "plain letters, one byte each: 0123456789"
    found = saccade.compress_text(loaded, text, 10, score="self_information", unit="token")
    ids = torch.tensor(list(text.encode()))
    with saccade.Context(loaded) as ctx:
        scores = self_information(ctx, ids)
    assert torch.equal(found.scores, scores)
    assert found.text.encode() == bytes(saccade.compress_context(ids, scores, 10).tolist())


def test_a_short_text_stays_as_it_is(call):
    code, out, err = call("--to", "1k")
    assert code == 0 and out == TEXT and "has 162 tokens, not more than --to 1024" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--to: this option is required."),
        ("--to 0", "expected a number of tokens such as 4096 or 4k"),
        ("--to 9 --score contrastive", "--score contrastive compares .* give a question"),
        ("--to 9 --score self_information --question a", "does not look at a question"),
        ("--to 9 --protect (", "--protect '(' is no regular expression .* numbers, urls"),
        ("--to 9 --protect (?s).", "what is protected has 162 tokens .* more than the 9 to keep"),
        ("--to 1 --unit chunk", "no unit fits into 1 tokens, the shortest has 2"),
        ("--to 9 --window 600", "--window 600: expected 2 to 512 tokens"),
        ("--to 9 --window 60 --overlap 60", "--overlap 60: expected 1 to 59 tokens"),
        ("--to 9 --unit word", "expected one of token, sentence, chunk"),
        ("--to 9 --out no/where", "there is no folder no"),
    ],
)
def test_refusals(call, words, said):
    code, out, err = call(*words.split())
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and re.search(said.replace("'('", r"'\('"), last), err
    assert last.startswith("saccade")


def test_files_that_hold_no_text(call, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    assert "t.txt is not UTF-8 text (at byte 3)" in call("--to", "9")[2]
    (tmp_path / "t.txt").write_bytes(b" \n")
    assert "t.txt is empty" in call("--to", "9")[2]
    assert "missing cannot be read" in call("--to", "9", file=str(tmp_path / "missing"))[2]


def test_a_stop_leaves_no_file(call, tmp_path, monkeypatch):
    out, whole = tmp_path / "out.txt", ["--to", "64", "--out", str(tmp_path / "out.txt")]

    def stop(*_):
        raise Stopped(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("saccade.runtime.text_scores.TextScorer._of_window", stop)
        assert call(*whole)[:2] == (130, "") and not out.exists()
    code, shown, err = call(*whole)
    assert (
        (code, shown) == (0, "")
        and err.endswith(f"Wrote {out}\n")
        and is_part(out.read_text(), TEXT)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"t.txt", "out.txt"}


def test_a_tokenizer_that_does_not_say_where_tokens_lie(loaded):
    with pytest.raises(BadInput, match="Bytes does not say where in a text its tokens lie"):
        saccade.compress_text(loaded, TEXT, 9, tokenizer=Bytes())
