"""Facts about the machine, read when a function is called and never at import."""

from __future__ import annotations

import psutil
import torch


def available_memory() -> int:
    """Bytes of host memory that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type != "cuda":
        return available_memory()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def resident_memory() -> int:
    """Bytes of host memory that this process occupies (resident set size)."""
    return int(psutil.Process().memory_info().rss)
