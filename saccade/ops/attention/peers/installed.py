"""Which peers are installed: found without an import, imported at a call that they could take."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

AMPERE, HOPPER = (8, 0), (9, 0)


def gpu_refusal(device: torch.device, least: tuple[int, int], most: tuple[int, int]) -> str | None:
    """Why kernels for GPUs of these compute capabilities cannot run over tensors of a device."""
    if torch.compiler.is_compiling():  # before cached functions: Dynamo warns about those
        return "it has no torch.compile registration"
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if not least <= capability <= most:
        bounds = " to ".join(f"{major}.{minor}" for major, minor in sorted({least, most}))
        return f"it needs a GPU of compute capability {bounds}, got {capability[0]}.{capability[1]}"
    return None


@cache
def is_found(module: str, file: str = "") -> bool:
    """Whether a top-level module is installed; nothing is imported.

    Args:
        file: one that its folder has to hold, where packages share the folder.
    """
    spec = find_spec(module)
    if spec is None or not file:
        return spec is not None
    return any((Path(folder) / file).exists() for folder in spec.submodule_search_locations or ())


def refusal(
    device: torch.device,
    capabilities: tuple[tuple[int, int], tuple[int, int]],
    package: str,
    module: str,
    file: str = "",
) -> str | None:
    """Why a peer cannot run over tensors of a device at all, its import apart.

    Args:
        capabilities: the least and the most that its kernels are for.
        package: its name, for the sentence; module, file: as in `is_found`.
    """
    reason = gpu_refusal(device, *capabilities)
    if reason is not None or is_found(module, file):
        return reason
    return f"the package {package} is not installed"


def import_refusal(module: str) -> str | None:
    """Imports a module that was found; what goes wrong as a clause, None where nothing does."""
    tried = _tried(module)
    if not isinstance(tried, Exception):
        return None
    reason = " ".join(str(tried).split())
    return f"{module} is installed and cannot be imported ({type(tried).__name__}: {reason})"


def load(module: str) -> Any:
    """A module whose import was not refused."""
    tried = _tried(module)
    if isinstance(tried, Exception):
        raise tried
    return tried


@cache
def _tried(module: str) -> Any:
    """The module, or the error of its import: the wheel may be one for another PyTorch or CUDA."""
    try:
        return import_module(module)
    except Exception as error:
        return error
