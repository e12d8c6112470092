"""`saccade compare` end to end on the real model, at the smallest size that means something."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from saccade.core import BadInput
from saccade.evals.compare import run
from saccade.evals.rows import BASELINE

pytestmark = pytest.mark.real_model
COMMAND = [sys.executable, "-m", "saccade"]


@pytest.fixture(scope="module")
def model():
    from saccade.hf.load import load_model

    return load_model("smollm2")


@pytest.fixture(scope="module")
def report(model):
    return run(model, context=400, quick=True, rows=["flash", "MHA", "int8", "SnapKV, KV"])


def row(report, part):
    return next(r for r in report.rows if part in r.name)


def test_every_cell_is_measured(report):
    assert report.complete and report.rows[0].name == BASELINE
    for r in report.rows:
        assert r.status == "ok", r.note
        cells = (r.prefill_tps, r.decode_tps, r.perplexity, r.kl, r.same_top, r.cache_bytes)
        assert all(cell is not None for cell in cells)
        assert r.needle_trials == 2


def test_exact_techniques_are_exact(report):
    for part in ("flash", "MHA"):
        assert row(report, part).kl < 1e-6
        assert row(report, part).perplexity == pytest.approx(report.rows[0].perplexity, rel=1e-4)


def test_the_exact_model_finds_a_needle(report):
    assert report.rows[0].needle >= 0.5


def test_memory_follows_what_is_stored(report):
    flash = row(report, "flash").cache_bytes
    assert row(report, "MHA").cache_bytes == 3 * flash
    assert row(report, "SnapKV").cache_bytes < flash / 2
    assert row(report, "int8 KV").cache_bytes < flash


def test_int8_is_nearly_exact(report):
    assert 0 < row(report, "int8 KV").kl < 1e-2


def test_bad_requests(model):
    with pytest.raises(BadInput, match="no row is called 'magic'; expected one of: standard"):
        run(model, context=400, quick=True, rows=["magic"])
    with pytest.raises(BadInput, match="context of at least 256 tokens, got 5"):
        run(model, context=5)
    with pytest.raises(BadInput, match="Give a longer text or a smaller context"):
        run(model, "short text", context=400, quick=True)


def test_generate_streams_an_answer():
    options = "generate --model smollm2 --raw --n-predict 4 --swa 64 --sinks 4"
    done = subprocess.run(
        [*COMMAND, *options.split(), "--prompt", "The capital of France is"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Paris" in done.stdout


def test_ctrl_c_keeps_finished_rows(tmp_path):
    path = tmp_path / "record.json"
    process = subprocess.Popen(
        [*COMMAND, "compare", "--quick", "--context", "300", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A test run in the background may have been started with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        for line in process.stderr:  # plain progress lines: the third row has begun
            if "GQA" in line or "MHA" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    record = json.loads(path.read_text())
    assert not record["complete"] and len(record["rows"]) >= 2
    assert "standard attention" in out and "Traceback" not in out
