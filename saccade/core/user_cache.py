"""What is remembered between runs, in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """`saccade/name` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "saccade" / name
