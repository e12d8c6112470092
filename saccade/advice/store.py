"""What was measured or worked out once, remembered in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

OLD: Final = 7 * 24 * 3600
"""Seconds after which a time is measured again: the machine may have been busy."""


def folder() -> Path:
    """`saccade/plan` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "saccade" / "plan"


def recall(kind: str, *parts: object) -> Any:
    """What was remembered under these parts, None where nothing was, or it is old or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
        path = _file(kind, parts)
        if time.time() - path.stat().st_mtime < OLD:
            return json.loads(path.read_text())["value"]
    return None


def remember(kind: str, value: Any, *parts: object) -> None:
    """Keep a JSON value under these parts; where the folder cannot be written, nothing is kept."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _file(kind, parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"of": [str(part) for part in parts], "value": value}, file)
        Path(file.name).replace(path)


def _file(kind: str, parts: tuple[object, ...]) -> Path:
    key = "\n".join(str(part) for part in parts)
    return folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
