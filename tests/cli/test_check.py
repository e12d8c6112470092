"""`saccade check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saccade.cli.check import table
from saccade.cli.main import main
from saccade.hf import check
from tests.tiny_models import tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model(tiny_config("llama"), "eager").save_pretrained(path)
    return path


def test_every_standard_option_is_compared(folder: Path, capsys: Any) -> None:
    assert main(["check", "--model", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.endswith("the same") for line in lines[1:])


def test_rounding_of_layers_is_named_where_it_is_what_is_seen(folder: Path, capsys: Any) -> None:
    assert main(["check", "-m", str(folder), "--swa", "16", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "are rounding: every layer rounds to bfloat16." in out and "With --dtype f32 " in out


def test_logits_that_rounding_replaces_are_not_called_the_same() -> None:
    """Two vectors that have nothing in common differ by more than the size of one of them."""
    found = check.Checked(options="n_swa=2", gap=7.0, bound=20.0)
    assert "not told apart: rounding alone" in table([found], {})


def test_the_options_given_are_compared_alone(folder: Path, capsys: Any) -> None:
    assert main(["check", "-m", str(folder), "--swa", "16", "--sinks", "2", "-c", "64"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("--swa 16, --sinks 2 ") and last.endswith("the same")


def test_results_that_differ_are_an_error(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        check,
        "check_options",
        lambda *_: check.Checked(
            options="n_swa=16", gap=0.5, bound=1e-4, layer="layers.1", leave_out="n_swa"
        ),
    )
    assert main(["check", "-m", str(folder), "--swa", "16"]) == 2
    said = capsys.readouterr()
    assert "DIFFERENT" in said.out
    assert "first in layers.1. Leave out --swa." in said.err


def test_options_that_cannot_run_are_an_error_where_they_were_asked_for(
    folder: Path, capsys: Any
) -> None:
    assert main(["check", "-m", str(folder), "--rope-scaling", "linear", "--rope-scale", "2",
                 "--yarn-ext-factor", "1"]) == 2  # fmt: skip
    out = capsys.readouterr().out
    assert "--rope-scale 2, --yarn-ext-factor 1" in out
    assert "refused: yarn options need --rope-scaling yarn" in out
