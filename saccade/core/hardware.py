"""Facts about the machine, read when a function is called and never at import."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import psutil
import torch

_CPUINFO = Path("/proc/cpuinfo")
FAMILIES = ("amx", "zen5", "zen4", "avx512", "avx2", "neon", "other")
"""Processors that behave alike, each with measured rules of its own (`ops/tuning`)."""


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


@cache
def processor_family() -> str:
    """One of FAMILIES: what kind of CPU this is."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    facts = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    flags = facts.get("flags", "").split()
    if not flags:  # not Linux: torch knows the vector instructions
        vector = torch.backends.cpu.get_cpu_capability()
        flags = {"AVX512": ["avx512f", "avx2"], "AVX2": ["avx2"]}.get(vector, [])
    return family_of(platform.machine(), facts.get("vendor_id", ""), facts.get("cpu family"), flags)


def family_of(machine: str, vendor: str, number: str | None, flags: Collection[str]) -> str:
    """One of FAMILIES by what Linux says of a CPU.

    AMX comes first (Sapphire Rapids and later); AMD's families 26 and 25 are Zen 5 and Zen 4 where
    they have AVX-512.
    """
    if machine in ("aarch64", "arm64"):
        return "neon"
    if {"amx_tile", "amx_bf16"} <= set(flags):
        return "amx"
    if vendor == "AuthenticAMD" and "avx512f" in flags:
        return {"26": "zen5", "25": "zen4"}.get(number or "", "avx512")
    if "avx512f" in flags:
        return "avx512"
    return "avx2" if "avx2" in flags else "other"
