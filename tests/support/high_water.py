"""Peak memory of some work: what it needed above what was in use before.

Linux keeps a high-water mark of resident memory, which is reset and read, so that nothing has to
be sampled (psutil can do neither); elsewhere the peak is None rather than a guess.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from saccade.core.hardware import resident_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """`start()` before the work, then `bytes()` gives the peak above the start."""

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self) -> None:
        """Return freed memory to the system and reset the high-water mark."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")
            self._before = resident_memory()
        except (OSError, AttributeError):
            self._before = None

    def bytes(self) -> int | None:
        """Bytes of the peak above the start, or None where the system does not say."""
        if self._before is None:
            return None
        lines = _STATUS.read_text().splitlines()
        high_water = next(line for line in lines if line.startswith("VmHWM:"))  # in KiB
        return max(0, int(high_water.split()[1]) * 1024 - self._before)
