"""How many examples a fuzzer runs: a few seconds in CI, more with SACCADE_FUZZ=5000."""

from __future__ import annotations

import ast
import os
import traceback
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, settings

import saccade

PACKAGE = str(Path(saccade.__file__).parent)


def fuzz(examples: int) -> settings:
    """`examples` fixed ones, or as many new ones as the environment variable says."""
    wanted = os.environ.get("SACCADE_FUZZ")
    return settings(
        max_examples=int(wanted) if wanted else examples,
        derandomize=not wanted,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@cache
def _raising_lines(path: str) -> frozenset[int]:
    """Lines of `raise` statements, and of calls of the C++ kernels, which check their arguments."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        native = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("kernels.")
        if native or isinstance(node, ast.Raise):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def assert_sentence(error: BaseException) -> None:
    """Fail unless an error is of a kind for callers, made by the package, in whole sentences."""
    assert isinstance(error, (ValueError, TypeError)), f"raw {type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(PACKAGE), f"raised in {last.filename}: {error!r}"
    on_purpose = last.lineno in _raising_lines(last.filename)
    assert on_purpose, f"not raised on purpose: {last.line!r}: {error!r}"
    text = str(error)
    assert text.endswith(".") and len(text.split()) > 4, f"no sentence: {text!r}"
