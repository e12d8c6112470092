"""Where a model runs, the form of its weights and the dtype of its activations."""

from __future__ import annotations

from typing import Any, Final, Literal

import torch

from saccade.core import BadInput
from saccade.runtime.weights import held_as

DEVICES: Final = ("auto", "cpu", "cuda")
WEIGHTS: Final = ("file", "int8", "int4", "bf16", "f32")
"""What `load_model` takes as `weights`."""
Form = Literal["file", "plain", "int8", "int4"]
"""A GGUF file's own blocks, plain numbers, or rounded to 8 or 4 bits."""


def device_of(wanted: str | torch.device | None) -> torch.device:
    """The device that is meant: None is the CPU, "auto" a CUDA GPU where there is one.

    Raises:
        BadInput: a CUDA device that is not there, or another kind of device.
        TypeError: neither a name nor a device.
    """
    if wanted is not None and not isinstance(wanted, str | torch.device):  # type: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a torch.device, its name or None as device, got {wanted!r}.")
    if wanted is None or wanted == "auto":
        here = wanted == "auto" and torch.cuda.is_available()
        return torch.device("cuda" if here else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise BadInput(_unknown(wanted)) from None
    if device.type not in DEVICES:
        raise BadInput(_unknown(wanted))
    here = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= here:
        raise BadInput(
            f"device={str(wanted)!r} needs a CUDA GPU, but PyTorch sees {here} "
            'of them. Use device="cpu", or a build of PyTorch for your GPU.'
        )
    return device


def form_and_dtype(
    weights: Any, dtype: Any, device: torch.device, *, is_folder: bool
) -> tuple[Form, torch.dtype | None]:
    """The form of the weights, and the dtype of activations and plain weights; None: the folder's.

    Args:
        weights, dtype: as `load_model` is given them.

    Raises:
        TypeError: no name of a form, or no floating-point dtype.
        ValueError: a form that there is not, or one that excludes the dtype.
    """
    if not isinstance(weights, str):
        raise TypeError(f"expected one of {', '.join(WEIGHTS)} as weights, got {weights!r}.")
    if weights not in WEIGHTS:
        raise ValueError(f"expected one of {', '.join(WEIGHTS)} as weights, got {weights!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"expected a floating-point torch.dtype or None as dtype, got {dtype!r}.")
    held, own = held_as(weights, dtype, device.type, is_folder=is_folder)
    return held, own  # type: ignore[return-value]


def _unknown(wanted: object) -> str:
    return f"expected one of {', '.join(DEVICES)} or cuda:N as device, got {str(wanted)!r}."
