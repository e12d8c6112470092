"""Peak memory by one rule wherever it is shown: what PyTorch's allocator handed out.

Counted is what is alive at once above the start.  The high-water mark of a process moves with what
its heap happens to keep and share; the sizes of allocations are the same in every run.  On a CPU
PyTorch's profiler lists every allocation and release, also those inside of operators; the
workspaces that our C++ kernels allocate by themselves are added.  On a GPU the CUDA allocator keeps
the maximum.
"""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.profiler import profile

from saccade.ops.planning import LargestWorkspace

_MEMORY = "[memory]"


class AllocatedPeak:
    """`with AllocatedPeak(device) as peak:`, then `peak.bytes` is the most allocated inside.

    Args:
        device: where the work runs: a CPU or a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._before = 0
        self._stack = ExitStack()
        self._profile: Any = None
        self._workspace = LargestWorkspace()

    def __enter__(self) -> AllocatedPeak:
        gc.collect(1)  # what is let go inside should have been allocated inside
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and ends
            self._profile = self._stack.enter_context(
                profile(use_kineto=False, profile_memory=True)
            )
            self._stack.enter_context(self._workspace)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif error[0] is None:
            self.bytes = _most_alive(self._profile.kineto_results.events()) + self._workspace.bytes
        self._profile = None


def _most_alive(events: Any) -> int:
    """The maximum of allocations minus releases, in the order in which they happened."""
    steps = [(e.start_ns(), at, e.nbytes()) for at, e in enumerate(events) if e.name() == _MEMORY]
    alive = most = 0
    for _, _, num_bytes in sorted(steps):
        alive += num_bytes
        most = max(most, alive)
    return most
