"""A transformers model whose weights are read one by one, while it is built.

transformers takes a state dict whose tensors are read when they are put into the model: what
safetensors calls slices.  So a tensor is in memory once, as it stays.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Read = Callable[[], Tensor]


class LazyTensor:
    """The shape of a tensor, which `[...]` reads."""

    def __init__(self, shape: tuple[int, ...], read: Read) -> None:
        self.shape, self._read = shape, read

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors would say it of numbers that are cast when they are loaded."""
        return "F32"

    def __getitem__(self, _: Any) -> Tensor:
        return self._read()


class _InTurn:
    """Reads one tensor at a time, whichever thread asks, and keeps what failed.

    transformers reads in several threads, and of what fails there only a text is left.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def after(self, read: Read) -> Read:
        """`read` in its turn."""

        def wait_and_read() -> Tensor:
            with self._lock:
                try:
                    return read()
                except Exception as error:
                    self.error = self.error or error
                    raise

        return wait_and_read


def streamed_model(
    shapes: PreTrainedModel,
    config: PreTrainedConfig,
    reads: Mapping[str, tuple[tuple[int, ...], Read]],
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of the class of `shapes`, and what transformers says of missing and other keys.

    Args:
        reads: name in the checkpoint -> shape and what reads it, in `dtype`.

    Raises:
        Exception: whatever a read raises.
    """
    turns = _InTurn()
    state = {name: LazyTensor(shape, turns.after(read)) for name, (shape, read) in reads.items()}
    kind: Any = type(shapes)
    try:
        loaded = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            attn_implementation=shapes.config._attn_implementation,
            output_loading_info=True,
        )
    except Exception:
        if turns.error is not None:
            raise turns.error from None
        raise
    _give_back_memory()
    return loaded


def _give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps what lies between the weights, for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
