"""The text a comparison reads: a real one that every CPython carries, or the user's own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from saccade.core import BadInput


def default_text() -> str:
    """The help topics of the running Python, about 460 kB of technical English."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        BadInput: a missing, empty or non-UTF-8 file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read the text {path}: {error.strerror}.") from None
    if not text.strip():
        raise BadInput(f"{path} is empty: give a text to read.")
    return text
