"""What can run on a device: the installed Triton, the GPU's architecture and its features.

Nothing here imports Triton, so these functions work on any machine.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on CPU tensors, for tests
INTERPRETER = "interpreter"
HOPPER = (9, 0)
GLUON_TRITON = "3.6"  # Gluon is experimental: the kernels are tested with this release only


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run over tensors of a device, or None."""
    if not INSTALLED:
        return "the package triton is not installed"
    if device.type != "cuda":
        return None if INTERPRETED else f"tensors are on {device.type}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    return None


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run over tensors of this device."""
    return triton_refusal(device) is None


def gluon_refusal(device: torch.device) -> str | None:
    """Why Gluon kernels for Hopper cannot run over tensors of a device, or None."""
    if torch.compiler.is_compiling():  # before cached functions: Dynamo warns about those
        return "it has no torch.compile registration"
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return "the GPU is not a Hopper (compute capability 9.0)"
    if not _triton_version().startswith(GLUON_TRITON + "."):
        return f"it needs triton {GLUON_TRITON}, found {_triton_version()}"
    return None


@cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@cache
def architecture(device: torch.device) -> str:
    """Name of a GPU's tuning tables: "sm_90", or "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 2 for the interpreter, so that it tests split-KV too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def converts_fp8(device: torch.device) -> bool:
    """Whether the GPU converts to float8_e4m3fn: Ada (compute capability 8.9) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
