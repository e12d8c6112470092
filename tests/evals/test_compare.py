"""`saccade compare` end to end on the real model, at the smallest size that means something."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from saccade.cli import main
from saccade.evals import compare
from saccade.evals.rows import FLASH, INT8, MHA, SDPA, SNAPKV, TEXTBOOK

pytestmark = pytest.mark.real_model
COMMAND = [sys.executable, "-m", "saccade"]


@pytest.fixture(scope="module")
def report():
    from saccade.hf.load import load_model

    rows = ["flash", "MHA", "GQA", INT8, SNAPKV]
    model = load_model("smollm2", weights="f32")
    with pytest.MonkeyPatch.context() as patch:  # rounds are tested on a tiny model
        patch.setattr(compare, "QUICK", replace(compare.QUICK, scored=96, steps=4, rounds=1))
        return compare.run(model, context=256, quick=True, rows=rows)


def test_every_cell_is_measured(report):
    assert report.complete and report.rows[0].name == TEXTBOOK
    for name in (TEXTBOOK, SDPA, FLASH, MHA, INT8, SNAPKV):
        row = report.row(name)
        cells = (row.prefill_tps, row.decode_tps, row.perplexity, row.kl, row.same_top)
        assert all(cell is not None for cell in cells), name
        assert row.needle_trials >= 3 and row.peak_bytes > row.cache_bytes


def test_exact_techniques_are_exact(report):
    for name in (TEXTBOOK, FLASH, MHA):
        row = report.row(name)
        assert row.kl < 1e-6 and row.needle == 1, name
        assert row.perplexity == pytest.approx(report.row(SDPA).perplexity, rel=1e-4)
        assert row.perplexity_ratio_se < 1e-4


def test_memory_follows_what_is_stored(report):
    flash = report.row(FLASH).cache_bytes
    assert report.row(MHA).cache_bytes == 3 * flash
    assert report.row(SNAPKV).cache_bytes < flash / 2
    assert report.row(TEXTBOOK).peak_bytes > report.row(FLASH).peak_bytes


def test_int8_is_nearly_exact(report):
    assert 0 < report.row(INT8).kl < 1e-2


def test_claims_stand_beside_what_was_measured(report):
    claims = {(claim.technique, claim.quantity): claim for claim in report.claims}
    assert "of the cache of MHA" in claims["GQA (the model as it is)", "memory saved"].measured
    assert "67 %" in claims["GQA (the model as it is)", "memory saved"].reason
    assert claims["MQA (by conversion)", "speed-up"].measured == "not measured in this run"


def test_generate_streams_an_answer(capsys):
    options = "generate --model smollm2 --raw --n-predict 4 --swa 64 --sinks 4"
    assert main.main([*options.split(), "--prompt", "The capital of France is"]) == 0
    assert "Paris" in capsys.readouterr().out


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
            if "flash attention" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert not path.exists()
    record = json.loads((tmp_path / "record.stopped-1.json").read_text())
    assert not record["complete"] and len(record["rows"]) >= 2
    assert SDPA in out and "Traceback" not in out
