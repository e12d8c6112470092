"""Whole models against llama.cpp and transformers: rounds, records, tables, shaped files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from benchmarks import llamacpp_peer, shaped_gguf, whole_model
from saccade.runtime.located import located
from saccade.runtime.plan_files import blueprint_of
from scripts import page_whole_model

MODEL = "SmolLM2-135M-Instruct.Q4_1"


def spoken(request, peer_python):
    """What a process would say; llama.cpp decodes twice as fast as the others."""
    if request["job"] == "logits":
        wrong = 0.1 * ("weights" in request["options"] and request["options"]["weights"] == "int4")
        random = np.random.default_rng(0).normal(size=(request["scored"], 32)).astype(np.float32)
        np.save(request["out"], random + wrong * random[::-1])
        return {"weights": "Q4_1 as in the file"}
    fast = 1 + (request["engine"] == "llama.cpp")
    bytes_of = {"resident": 10**9, "peak": 2 * 10**9}
    return {
        "ready_s": 2.0, "load_s": 1.0, "load_cpu_s": 1.0, "first_token_s": 2.0 / fast,
        "decode_tps": [9.0 * fast, 10.0 * fast, 11.0 * fast], "cache_bytes": 10**6,
        "before": {"resident": 10**8}, "loaded": bytes_of, "ended": bytes_of,
    }  # fmt: skip


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(*words)` runs the script with processes that only speak; the record it wrote."""
    path = tmp_path / "record.json"
    monkeypatch.setattr(whole_model, "run", spoken)
    monkeypatch.setattr(whole_model, "tokens_of", lambda _, count: list(range(count)))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["whole_model", "--out", str(path), *words])
        whole_model.main()
        return path, json.loads(path.read_text())

    return run


WORDS = ("--contexts", "512", "--rounds", "2", "--peer-python", "python", "--rows", "saccade",
         "saccade, weights int4", "llama.cpp")  # fmt: skip


def test_rounds_go_through_all_rows_in_turns_and_a_record_is_continued(measured):
    path, record = measured(*WORDS)
    order = [(row["round"], row["name"]) for row in record["rows"]]
    names = ["saccade", "saccade, weights int4", "llama.cpp"]
    assert order == [(turn, name) for turn in (0, 1) for name in names]
    _, record = measured(*WORDS)
    assert [row["round"] for row in record["rows"][6:]] == [2, 2, 2, 3, 3, 3]
    assert len(record["kl"]) == 3, "KL that is there is not measured again"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"environment": data["environment"] | {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="cannot be continued"):
        measured(*WORDS)


def test_kl_is_from_float32_of_the_same_file(measured):
    _, record = measured(*WORDS, "--seconds", "1e9")
    found = {row["name"]: row for row in record["kl"]}
    assert found["saccade"]["kl"] == 0 and found["saccade"]["same_top"] == 1
    assert found["saccade, weights int4"]["kl"] > 1e-3
    assert found["saccade"]["weights"] == "Q4_1 as in the file"


def test_rows_that_fail_stay_in_the_record(measured, monkeypatch):
    monkeypatch.setattr(whole_model, "run", lambda *_: {"failed": "exit code -9: "})
    path, record = measured(*WORDS)
    assert all("failed" in row for row in (*record["rows"], *record["kl"]))
    assert "failed" in page_whole_model.whole_model(path, MODEL)


def test_tables_show_medians_intervals_and_ratios_to_the_peer(measured):
    path, _ = measured(*WORDS)
    table = page_whole_model.whole_model(path, MODEL)
    line = next(line for line in table.splitlines() if line.startswith("| saccade |"))
    assert "10.0 (0.50x)" in line and "2.00 s (2.00x)" in line
    bars = page_whole_model.bars(path, MODEL)
    assert "| decoding against llama.cpp, 512 | 0.50x | ≥ 0.8x | ✗ |" in bars
    assert "✓" in next(line for line in bars.splitlines() if "KL of weights" in line)
    assert "| saccade, weights int4 |" in page_whole_model.divergence(path)


def test_without_the_peer_it_is_left_out_or_refused(measured, capsys):
    _, record = measured("--quick", "--kl")
    assert {row["name"] for row in record["rows"]} == {"saccade"}
    assert "llama.cpp is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measured("--rows", "llama.cpp")
    assert "needs --peer-python" in capsys.readouterr().err


def test_rates_are_of_equal_runs_of_steps():
    assert llamacpp_peer.rates([0.0, 1.0, 2.0, 2.5, 3.0], 2) == [1.0, 2.0]


def test_a_failing_process_is_a_row(tmp_path):
    request = {"engine": "llama.cpp", "job": "nothing", "model": "m", "options": {}, "threads": 1}
    assert "KeyError: 'nothing'" in whole_model.run(request, sys.executable)["failed"]
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    dead.chmod(0o755)
    assert whole_model.run(request, str(dead))["failed"] == "exit code 9: out of memory"


@pytest.mark.parametrize("name", shaped_gguf.SHAPES)
def test_shapes_have_the_parameters_of_their_models(name):
    shape = shaped_gguf.SHAPES[name]
    numbers = sum(out * width for _, (out, width), _ in shaped_gguf.matrices(shape))
    numbers += sum(length for _, length, _ in shaped_gguf.vectors(shape))
    known = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
             "qwen3-0.6b": 596_049_920, "llama3.2-1b": 1_235_814_400,
             "llama3.1-8b": 8_030_261_248, "gemma3-270m": 268_098_176}  # fmt: skip
    assert numbers == known.get(name, numbers)


SMALL = replace(shaped_gguf.SHAPES["tiny"], layers=1, hidden=32, heads=1, kv_heads=1, ffn=64)


@pytest.mark.real_model
def test_a_shaped_file_is_read_by_the_package_gguf_and_by_plans(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    words = ["shaped_gguf", "--shape", "tiny", "--kind", "BF16", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(shaped_gguf, "SHAPES", {"tiny": SMALL})
    shaped_gguf.main()
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    numbers = gguf.dequantize(tensors["blk.0.attn_k.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert numbers.shape == (64, 32) and abs(numbers.std() * 32**0.5 - 1) < 0.1
    found = blueprint_of(located(path), torch.bfloat16, torch.float32)
    assert found is not None and found.inner == 64 and found.facts.vocab_size == 49408
