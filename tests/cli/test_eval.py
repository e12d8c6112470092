"""`saccade eval`: what it asks for, what it refuses in one sentence, and what signals leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from saccade.cli import main
from saccade.evals.kept import KeptSamples
from saccade.report.evaluation import read
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model

BAD = [
    ([], "saccade eval: TASK...: at least one is required."),
    (["nope"], "no task is called 'nope': expected one of ruler, niah"),
    (["vt", "--policy", "snapkv"], "--policy and --budget go together"),
    (["vt", "--budget", "0.5"], "--policy and --budget go together"),
    (["vt", "--policy", "nope", "--budget", "0.5"], "unknown --policy 'nope'"),
    (["vt", "--policy", "snapkv", "--budget", "2.0"], "--budget: expected tokens (512), a share"),
    (["vt", "--cache-type", "int9"], "unknown --cache-type 'int9'"),
    (["vt", "--sparse", "nope"], "no pattern is called 'nope'"),
    (["vt", "--context", "4q"], "--context: expected a number of tokens"),
    (["vt", "--samples", "0"], "--samples: expected a whole number from 1 to 10000, got '0'"),
    (["vt", "--seed", "x"], "--seed: expected a whole number"),
    (["vt", "--gate", "2"], "--gate: expected a share from 0 to 1, got 2"),
    (["vt", "--question", "never"], "--question: expected one of after, before, both"),
    (["vt", "--json", "no/such/x.json"], "there is no folder no/such"),
    (["vt", "--keep", "."], "--keep . is a folder"),
    (["vt", "--keep", "a", "--json", "a"], "name the same file a"),
    (["vt", "--leaderboard", __file__], "is a file; expected a folder"),
    (["vt", "--text", "no/such/file"], "cannot read the text"),
    (["vt", "-m", "no/such/model"], "no/such/model"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD, ids=lambda x: " ".join(x) if x and isinstance(x, list) else ""
)
def test_wrong_inputs_are_one_sentence(capsys, words, said):
    assert main.main(["eval", *words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Loading")]
    assert out == "" and len(lines) == 1 and said in err and "Traceback" not in err


@pytest.fixture
def tiny(monkeypatch):
    from saccade.hf import load

    inner = tiny_model(tiny_config("llama", vocab_size=256, max_position_embeddings=4096))
    loaded = SimpleNamespace(
        model=inner, tokenizer=Bytes(), name="tiny", n_ctx_train=4096, weights="f32", notes=[]
    )
    monkeypatch.setattr(load, "load_model", lambda *_, **__: loaded)
    return loaded


CALL = "eval aggregate_compare --context 2500 --samples 2 --gate 0 --policy snapkv --budget 50%"


def test_table_files_and_record(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([*CALL.split(), "--json", "-", "--leaderboard", "lb", "--keep", "k"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert record["schema"] == "saccade.eval/1" and len(record["results"]) == 3
    assert record["settings"]["rows"]["snapkv 50 %"] == {"kv_policy": "snapkv", "kv_budget": 0.5}
    assert "snapkv 50 %, question after" in out and "aggregate_compare" in out
    assert "Wrote lb/saccade__2500__tiny__snapkv__0.50" in err
    assert len(Path("k").read_text().splitlines()) == 1 + 3 * 2


def test_lists_are_combined(tiny, tmp_path, capsys):
    words = "eval aggregate_time --context 2500 --samples 1 --gate 0 --sparse none,block_topk"
    words += " --policy none,snapkv --budget 50%,100 --question after --json -"
    assert main.main(words.split()) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["row"] for result in record["results"]] == [
        "dense", "block_topk", "snapkv 50 %", "snapkv 50 %, block_topk", "snapkv 100 tokens",
        "snapkv 100 tokens, block_topk",
    ]  # fmt: skip


def test_ctrl_c_shows_and_keeps_what_is_finished(tiny, tmp_path, monkeypatch, capsys):
    from saccade.evals import evaluate

    real, calls = evaluate.answer, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "answer", stopping)
    words = [*CALL.split(), "--keep", "k", "--json", "r.json", "--leaderboard", "lb"]
    assert main.main(words) == 130
    err = capsys.readouterr().err
    assert "Stopped. The finished samples are kept." in err and not Path("lb").exists()
    assert not Path("r.json").exists()
    stopped = read(Path("r.stopped-1.json"))
    assert not stopped.complete and stopped.results[-1].status == "stopped"
    assert main.main(words) == 0 and len(calls) == 4 + 3
    assert read(Path("r.json")).complete


def test_a_context_into_which_no_task_fits_is_never_done(tiny, capsys):
    assert main.main(["eval", "qa_fact", "--context", "10"]) == 2
    err = capsys.readouterr().err
    assert "100 %" not in err and "saccade: qa_fact needs at least" in err
    assert "got a context of 10. Give a longer one." in err


def test_a_length_beyond_the_trained_one_is_said_before_it_is_read(tiny, monkeypatch, capsys):
    from saccade.evals import evaluate

    def stopping(*args, on_progress, **options):
        on_progress(512, 4608)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_SECONDS", -1.0)
    monkeypatch.setattr(evaluate, "answer", stopping)
    assert main.main("eval aggregate_compare --context 4608 --samples 1".split()) == 130
    err = capsys.readouterr().err
    scaled = "4,608 tokens are beyond the 4,096 the model was trained for"
    assert f"Note: {scaled}: positions are scaled by YaRN x1.1." in err
    assert "aggregate_compare at 4,608: dense, 512 tokens read, about " in err
    assert err.endswith("Stopped. Nothing was scored yet.\n")


SLOW = """
import os, sys, time
from saccade.cli import main
from saccade.evals import evaluate
from saccade.hf import load
from tests.cli.test_eval import *
load.load_model = lambda *_, **__: SimpleNamespace(
    model=tiny_model(tiny_config("llama", vocab_size=256, max_position_embeddings=4096)),
    tokenizer=Bytes(), name="tiny", n_ctx_train=4096, weights="f32", notes=[])
real, calls = evaluate.answer, []
def slow(*args, **options):
    calls.append(1)
    if len(calls) == 4:
        os.write(1, b"@")
        time.sleep(60)
    return real(*args, **options)
evaluate.answer = slow
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_lose_nothing(tmp_path, number, code):
    keep = tmp_path / "k"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *CALL.split(), "--keep", str(keep)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout.read(1) == b"@"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    header, *lines = keep.read_text().splitlines()
    made_with = {name: value for name, value in json.loads(header).items() if name != "schema"}
    assert len(lines) == 3 and KeptSamples(keep, made_with)
