"""Facts about the machine, read when asked for and never at import."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    return _kilobytes("/proc/meminfo", "MemAvailable:")


def resident_memory() -> int | None:
    """Bytes of memory that this process occupies, or None where the system does not say."""
    return _kilobytes("/proc/self/status", "VmRSS:")


def _kilobytes(path: str, name: str) -> int | None:
    """The bytes behind a name in a file of lines like `VmRSS:  1234 kB`."""
    try:
        lines = Path(path).read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None
