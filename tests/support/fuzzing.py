"""How many examples a fuzzer runs: a few seconds in CI, more with SACCADE_FUZZ=5000."""

from __future__ import annotations

import os
import traceback
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


def assert_sentence(error: BaseException) -> None:
    """Fail unless an error is of a kind for callers, made by the package, in whole sentences."""
    assert isinstance(error, (ValueError, TypeError)), f"raw {type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(PACKAGE), f"raised in {last.filename}: {error!r}"
    line = (last.line or "").lstrip()
    assert line.startswith(("raise ", "kernels.")), f"not raised on purpose: {line!r}: {error!r}"
    text = str(error)
    assert text.endswith(".") and len(text.split()) > 4, f"no sentence: {text!r}"
