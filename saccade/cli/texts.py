"""Texts that a command is given: files and stdin, UTF-8."""

from __future__ import annotations

import sys
from pathlib import Path

from saccade.cli.failure import UsageError


def read_text(name: str, where: str) -> str:
    """The text of a file, of stdin where it is called `-`.

    Args:
        where: what messages call it, such as `--prompt-file FILE`.

    Raises:
        UsageError: it cannot be read, never ends, or is not UTF-8.
    """
    try:
        if name == "-":
            found = sys.stdin.buffer.read(_LONGEST + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                found = file.read(_LONGEST + 1)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}.") from None
    if len(found) > _LONGEST:
        raise UsageError(f"{where} has no end within 256 MiB: give a shorter text.")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (at byte {error.start}).") from None


_LONGEST = 2**28  # a device such as /dev/zero never ends
