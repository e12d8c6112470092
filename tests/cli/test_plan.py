"""`saccade plan`: the table, what fits, and refusals."""

import pytest
from transformers import MambaConfig

from saccade.cli import main
from tests.tiny_models import tiny_config


@pytest.fixture
def folder(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def call(capsys, *words):
    code = main.main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table(capsys, folder):
    code, out, said = call(capsys, "--model", folder, "--context", "1000", "--batch-size", "1000")
    assert (code, said) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line)
    assert lines["model"] == "tiny" and lines["context"].startswith("1,000 tokens")
    assert lines["cache"] == "1.00 MiB, 1.02 KiB a token" and "Not" in lines


def test_what_fits(capsys, folder):
    code, out, _ = call(capsys, "--model", folder, "--context", "100_000", "--memory", "16MiB")
    assert code == 0 and "In 16.0 MiB, 100,000 tokens of context:" in out
    asked = next(line for line in out.splitlines() if line.startswith("as asked"))
    window = next(line for line in out.splitlines() if line.startswith("window"))
    assert " no " in asked and asked.endswith(" tokens")
    assert " yes " in window and window.endswith("any length")


def test_options_count(capsys, folder):
    sizes = {}
    for words in ((), ("--type-k", "int4", "--type-v", "int4"), ("--swa", "64", "--sinks", "4")):
        _, out, _ = call(capsys, "--model", folder, "--context", "4096", *words)
        sizes[words[:1]] = next(line for line in out.splitlines() if line.startswith("cache"))
    assert len(set(sizes.values())) == 3
    assert sizes["--swa",].split()[1:3] == ["68.0", "KiB,"]


def test_refusals(capsys, tmp_path):
    code, out, said = call(capsys, "--model", "nowhere")
    assert (code, out) == (2, "") and said.count("\n") == 1 and "no model at 'nowhere'" in said
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)
    config.save_pretrained(tmp_path / "recurrent")
    code, out, said = call(capsys, "--model", str(tmp_path / "recurrent"))
    assert (code, out) == (2, "") and "none with attention" in said
