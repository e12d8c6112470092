"""Errors of writing a file, which name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Inside, an error of the system says which file could not be written.

    Those of opening a file do so by themselves; those of writing to it, a full disk say, do not.

    Raises:
        OSError: the one that was raised inside, with the name of `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
