"""What every record says of itself: revision, command, environment and date."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from saccade.report import environment
from saccade.report.record import as_text, origin, this_command


def test_an_origin_is_complete(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/bin/saccade", "bench", "cpu", "--json", "/a/b.json"]
    )
    found = origin()
    assert list(found) == ["revision", "command", "environment", "date"]
    assert found["command"] == "saccade bench cpu --json b.json"
    assert found["environment"]["torch"] and found["date"].endswith("+00:00")
    assert origin("make demo")["command"] == "make demo"


def test_commands_are_relative_to_the_repository():
    script = str(environment.ROOT / "benchmarks/caches.py")
    assert this_command([script, "--row", "a b"]) == "python benchmarks/caches.py --row 'a b'"
    assert this_command(["/elsewhere/tool", "x"]) == "tool x"


def test_modules_are_named_as_python_runs_them(tmp_path):
    code = "from saccade.report.record import this_command; print(this_command())"
    (tmp_path / "tried.py").write_text(code)
    command = [sys.executable, "-m", "tried", "--out", "x"]
    path = os.pathsep.join((str(tmp_path), str(environment.ROOT)))
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "python -m tried --out x"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small checkout in place of this one."""
    monkeypatch.delenv(environment.REVISION, raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for name in ("saccade/__init__.py", "benchmarks/results/x.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]

    def run(*words):
        subprocess.run([*git, *words], check=True, capture_output=True)

    run("init", "--quiet")
    return tmp_path, run


def test_a_revision_tells_changes_of_code_from_new_records(repository):
    root, run = repository
    assert environment.revision() is None  # not in the repository yet
    run("add", ".")
    run("commit", "--quiet", "-m", "first")
    clean = environment.revision()
    assert clean is not None and len(clean) == 12
    (root / "benchmarks/results/x.json").write_text("measured again")
    assert environment.revision() == clean
    (root / "saccade/__init__.py").write_text("changed")
    assert environment.revision() == f"{clean}+changes"


def test_a_copy_can_be_told_its_revision(repository, monkeypatch):
    monkeypatch.setenv("SACCADE_REVISION", "abcdef")
    assert environment.revision() == "abcdef"


def test_rows_have_a_line_each():
    data = {"schema": "x/1", "rows": [{"a": 1}, {"a": 2}], "empty": [], "numbers": [1, 2]}
    text = as_text(data)
    assert json.loads(text) == data and text.count("\n") == 9
    with pytest.raises(ValueError):
        as_text({"x": float("nan")})
