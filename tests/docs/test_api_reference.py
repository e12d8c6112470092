"""The reference of public names is built without a warning, and its checks find faults."""

import subprocess
import sys

from pdoc.doc import Function

from scripts.api_reference import PUBLIC, faults_of
from tests.docs.pages import ROOT


def test_it_is_built_without_faults_or_warnings(tmp_path):
    command = [sys.executable, "-m", "scripts.api_reference", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert pages == {"index.html", *(f"{name.replace('.', '/')}.html" for name in PUBLIC)}
    text = (tmp_path / "saccade.html").read_text()
    assert "attention" in text and "queries" in text


def undocumented(length):
    return length


def misdescribed(length):
    """What it does.

    Args:
        length, width: in tokens.
    """
    return length


def described(length, *more):
    """What it does.

    Args:
        length: in tokens.
        more: others.

    Raises:
        ValueError: never.
    """
    return length, more


def test_faults_are_found():
    def faults(function):
        return list(faults_of(Function(__name__, function.__name__, function, ("", ""))))

    (missing,) = faults(undocumented)
    (wrong,) = faults(misdescribed)
    assert missing.endswith("undocumented has no docstring")
    assert wrong.endswith("describes 'width', which is no argument")
    assert not faults(described)
