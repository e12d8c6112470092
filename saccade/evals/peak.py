"""Peak memory of a piece of work: what it needed above what was in use before.

On a CPU the kernel's own high-water mark of resident memory is reset and read, so that nothing
has to be sampled; where that is not possible (not Linux) the peak is None rather than a guess.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _kilobytes(name: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1])


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
            self._before = _kilobytes("VmRSS")
        except (OSError, AttributeError, StopIteration):
            self._before = None

    def bytes(self) -> int | None:
        """Bytes of the peak above the start, or None where the system does not say."""
        if self._before is None:
            return None
        return max(0, _kilobytes("VmHWM") - self._before) * 1024
