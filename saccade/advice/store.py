"""What was measured or worked out once, remembered in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Final

from saccade.core.user_cache import user_cache
from saccade.report.files import write_whole

OLD: Final = 7 * 24 * 3600
"""Seconds after which a time is measured again: the machine may have been busy."""


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
        write_whole(path, json.dumps({"of": [str(part) for part in parts], "value": value}))


def _file(kind: str, parts: tuple[object, ...]) -> Path:
    key = "\n".join(str(part) for part in parts)
    return user_cache("plan") / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
