"""saccade: long-context attention for PyTorch, on CPUs and GPUs.

Importing the package loads neither triton nor transformers nor matplotlib; each public name
arrives when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.core import AttentionOutput, BlockSelection, Mask, Unsupported
    from saccade.ops import attend, attention, decode, explain

__version__ = "0.1.0"

_HOME = {
    "AttentionOutput": "saccade.core",
    "BlockSelection": "saccade.core",
    "Mask": "saccade.core",
    "Unsupported": "saccade.core",
    "attend": "saccade.ops",
    "attention": "saccade.ops",
    "decode": "saccade.ops",
    "explain": "saccade.ops",
}

__all__ = [*sorted(_HOME), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
