"""Facts about the machine, read when a function is called and never at import."""

from __future__ import annotations

import psutil


def available_memory() -> int:
    """Bytes of host memory that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Bytes of host memory that this process occupies (resident set size)."""
    return int(psutil.Process().memory_info().rss)
