"""Host copies of small device tensors, remembered because every read synchronizes the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class HostMemo(Generic[T]):
    """`read(tensor)`, remembered until the tensor is written to or freed.

    The layers of a model pass the same few small tensors, so one read serves all layers.  Writes
    are noticed by PyTorch's version counter; tensors made under `torch.inference_mode` have none
    and are read every time.

    Args:
        read: makes a host value of a tensor, as a rule with a device synchronization.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self._read = read
        self._memo = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> T:
        """`read(tensor)`, from memory where the tensor has not changed since the last read."""
        if torch.compiler.is_compiling() or tensor.is_inference():
            return self._read(tensor)
        entry = self._memo.get(tensor)
        if entry is None or entry[0] != _state(tensor):
            with torch.inference_mode(False):  # may be used outside of inference mode later
                entry = _state(tensor), self._read(tensor)
            self._memo[tensor] = entry
        return entry[1]

    def is_current(self, tensor: Tensor) -> bool:
        """Whether the tensor was read and has not been written to since."""
        entry = None if tensor.is_inference() else self._memo.get(tensor)
        return entry is not None and entry[0] == _state(tensor)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on `device`; host reads are not allowed then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
