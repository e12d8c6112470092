"""`saccade generate --draft`: the same text, and how much of it was drafted."""

import json
import re

import pytest

from saccade.cli import main
from saccade.hf.load import LoadedModel
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model


def call(capsys, *words):
    code = main.main(["generate", "--model", "m", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_drafts_change_no_text_and_are_counted(capsys, monkeypatch):
    model = tiny_model(tiny_config("llama"))
    loaded = LoadedModel(model=model, tokenizer=Bytes(), name="tiny", n_ctx_train=512, notes=[])
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)
    words = ["-p", "hello" * 80, "-n", "20"]
    _, text, _ = call(capsys, *words)
    drafted = [*words, "--sparse", "strided", "--draft", "4"]
    code, out, err = call(capsys, *drafted)
    assert code == 0 and out == text
    found = re.search(r"; (\d+) of (\d+) drafted accepted, ([\d.]+) at once; cache ", err)
    record = json.loads(call(capsys, *drafted, "--json")[1])
    assert [record["accepted"], record["drafted"]] == [int(found[1]), int(found[2])]
    assert record["accepted_length"] == pytest.approx(float(found[3]), rel=0.05)
    assert 0 < record["accepted_length"] <= 4 and record["options"]["n_draft"] == 4
