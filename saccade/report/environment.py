"""Facts about the machine that a number belongs to: no paths, no host names, no user names."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REVISION = "SACCADE_REVISION"  # for a copy of the tree without git metadata: what it is a copy of
_CODE = ("saccade", "csrc", "benchmarks", "scripts", ":(exclude)benchmarks/results")


def facts() -> dict[str, Any]:
    """What a record keeps of the machine and of versions; None where it cannot be found out."""
    import torch

    return {
        "cpu": cpu_name(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu_names() or None,
        "driver": driver(),
        "os": os_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "transformers": version("transformers"),
        "saccade": version("saccade") or _own_version(),
    }


def version(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model of the CPU as its maker names it, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    except OSError:
        pass
    if platform.system() == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine() or "unknown CPU"


def cores() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory this process could use at most: the machine's, or its container's limit."""
    limits = [_sysconf_memory(), _container_limit()]
    return min((limit for limit in limits if limit), default=None)


def gpu_names() -> list[str]:
    """Names of the GPUs torch can use."""
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []


def os_name() -> str:
    """Distribution and kernel numbers; whatever else a kernel calls itself stays out."""
    numbers = re.match(r"\d+(\.\d+)?", platform.release())
    kernel = f"{platform.system()} {numbers[0] if numbers else ''}".strip()
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return ", ".join(part for part in (name, f"{kernel} {platform.machine()}") if part)


def driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def revision() -> str | None:
    """Git commit of the sources that run, with "+changes" where code differs from that commit.

    The variable SACCADE_REVISION comes first: a copied tree may lie in a repository of its own.
    """
    if given := os.environ.get(REVISION):
        return given
    git = ("git", "-C", str(ROOT))
    if _output(*git, "ls-files", "--error-unmatch", "saccade/__init__.py") is None:
        return None  # installed: a repository around it is not this one
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    changed = _output(*git, "diff", "--name-only", "HEAD", "--", *_CODE)
    return f"{commit}+changes" if commit and changed else commit


def _own_version() -> str:
    from saccade.version import __version__

    return __version__


def _sysconf_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _container_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _output(*command: str) -> str | None:
    """Standard output of a command, None where it is empty, missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
