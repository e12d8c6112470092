"""A GPU that failed: after some errors (an illegal memory access) a process cannot use it again.

Kernels run behind the program's back, so an error shows at whatever waits for the GPU next.  Each
row therefore waits for it at its end, and is blamed for its own errors alone.
"""

from __future__ import annotations

import torch

THE_ROW_BEFORE = "the GPU failed in the row before"


class GPUFailed(Exception):
    """Nothing more can be measured in this process.

    Attributes:
        error: what the GPU reported.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def wait(device: torch.device) -> None:
    """Wait for everything that was launched on a GPU, and raise its errors here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def end_if_failed(device: torch.device, error: Exception) -> None:
    """After an error: raise GPUFailed where the GPU does not work any more.

    Raises:
        GPUFailed: with that error.
    """
    try:
        wait(device)
    except RuntimeError:  # what the GPU reported once it reports at every call
        raise GPUFailed(error) from error
