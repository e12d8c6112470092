"""The versions that saccade runs with: one truth for pip, for messages and for the tests of CI."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from saccade.core import versions
from scripts.floors import floors
from tests.architecture.source import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_refused_and_what_pip_refuses_agree(package: str) -> None:
    assert versions.numbers(floors(PYPROJECT)[package]) == versions.OLDEST[package]
    wanted = tomllib.loads(PYPROJECT)["project"]["requires-python"]
    assert versions.numbers(wanted) == versions.OLDEST["python"]


@pytest.mark.parametrize("package", versions.NEWEST)
def test_the_newest_version_is_the_one_that_the_tests_are_set_up_with(package: str) -> None:
    pinned = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert versions.numbers(pinned[1]) == versions.NEWEST[package]


def test_versions_are_read_whatever_follows_the_numbers() -> None:
    found = [versions.numbers(v) for v in ("2.13.0+cpu", "5.16.0.dev0", "5.16rc1", "6")]
    assert found == [(2, 13), (5, 16), (5, 16), (6, 0)]


@pytest.mark.parametrize(("package", "old"), [("torch", "2.4.1"), ("transformers", "4.57.1")])
def test_an_old_version_is_refused(package: str, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda name: old)
    with pytest.raises(ImportError, match=f"or newer, got {old}. Run: pip install") as found:
        versions.require(package)
    assert found.value.name == package


def test_a_package_that_is_missing_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: None)
    versions.require("torch")  # built by oneself, it may have no metadata
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="transformers 5.16 or newer, which is not inst"):
        versions.require("transformers")


def test_the_command_line_says_it_in_one_sentence(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code = (
        "from importlib import metadata\nreal = metadata.version\n"
        "metadata.version = lambda name: '4.57.1' if name == 'transformers' else real(name)\n"
        f"from saccade.cli.main import main\nraise SystemExit(main(['check', '-m', '{tmp_path}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "saccade needs transformers 5.16 or newer, got 4.57.1. "
        'Run: pip install "transformers>=5.16"\n'
    )


def test_no_advice_installs_another_project() -> None:
    """The name saccade on the package index is another project's."""
    kinds = (".py", ".md", ".toml", ".txt", "Makefile", ".html")
    folders = ("saccade", "docs", "examples", "scripts", "benchmarks", "csrc")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    for file in files:
        if file.is_file() and file.name.endswith(kinds):
            text = file.read_text(errors="replace")
            assert not re.search(r"pip3? install[^\n]*[ \"\']saccade\b|saccade\[", text), file
