"""What tensors on a device hold, read by the host once: reading waits for everything before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class HostMemo(Generic[T]):
    """What `read` finds in a tensor, remembered until somebody writes to the tensor or frees it.

    The layers of a model pass the same few small tensors, so that the first of them reads for all.
    PyTorch counts who writes to a tensor, except for those made under `torch.inference_mode`: these
    are read every time.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self._read = read
        self._known = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> T:
        """What the tensor holds now."""
        if torch.compiler.is_compiling() or tensor.is_inference():
            return self._read(tensor)
        known = self._known.get(tensor)
        if known is None or known[0] != _state(tensor):
            with torch.inference_mode(False):  # what is remembered may be read anywhere
                known = _state(tensor), self._read(tensor)
            self._known[tensor] = known
        return known[1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor was read and nobody wrote to it since."""
        known = None if tensor.is_inference() else self._known.get(tensor)
        return known is not None and known[0] == _state(tensor)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


def capturing(device: torch.device) -> bool:
    """Whether work on a device is being recorded as a CUDA graph, when nothing can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
