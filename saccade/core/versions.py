"""Which versions of what saccade is built on it runs with: the oldest, and the newest tested.

Both are tested: `make test` runs with the newest (constraints.txt), `make test-oldest` with the
oldest.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from typing import Final

OLDEST: Final = {"python": (3, 11), "torch": (2, 11), "transformers": (5, 16)}
NEWEST: Final = {"torch": (2, 13), "transformers": (5, 23)}


def installed(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, int]:
    """Major and minor: (2, 13) of "2.13.0+cpu"."""
    found = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return (found[0], found[1]) if len(found) == 2 else (found[0] if found else 0, 0)


def text(version: tuple[int, int]) -> str:
    """ "2.13" of (2, 13)."""
    return ".".join(map(str, version))


def require(package: str) -> None:
    """Raise ImportError where a package is missing or older than what saccade runs with."""
    found, least = installed(package), text(OLDEST[package])
    if found is None and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"saccade needs {package} {least} or newer, which is not installed. "
            f'Run: pip install "{package}>={least}"',
            name=package,
        )
    if found is not None and numbers(found) < OLDEST[package]:
        raise ImportError(
            f"saccade needs {package} {least} or newer, got {found}. "
            f'Run: pip install "{package}>={least}"',
            name=package,
        )
