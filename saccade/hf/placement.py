"""Where a model runs and in which dtype."""

from __future__ import annotations

from typing import Any, Final

import torch

from saccade.core import BadInput

DEVICES: Final = ("auto", "cpu", "cuda")


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


def dtype_on(device: torch.device, said: torch.dtype | None, wanted: Any) -> torch.dtype | None:
    """Dtype of the weights on a device; None: as the file says.

    Args:
        said: dtype of a file that says none of its own (a GGUF), None for one that does.
        wanted: what the caller asks for, which is taken as it is.

    Raises:
        TypeError: not a floating-point dtype.
    """
    if wanted is not None:
        if not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
            raise TypeError(
                f"expected a floating-point torch.dtype or None as dtype, got {wanted!r}."
            )
        return wanted
    return torch.bfloat16 if said is torch.float32 and device.type == "cuda" else said


def _unknown(wanted: object) -> str:
    return f"expected one of {', '.join(DEVICES)} or cuda:N as device, got {str(wanted)!r}."
