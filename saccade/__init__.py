"""saccade: long-context attention for PyTorch, on CPUs and GPUs.

Importing the package loads neither triton nor transformers nor matplotlib; each public name
arrives when it is first used.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from saccade.version import __version__

if TYPE_CHECKING:
    from saccade.compress import compress_context
    from saccade.core import (
        AttentionOutput,
        BadInput,
        BlockSelection,
        Mask,
        PerHeadFP8,
        Unsupported,
        quantize_fp8_per_head,
    )
    from saccade.hf import Context, attach, compress_text, load_model, plan
    from saccade.ops import AttentionCall, attend, attention, explain, make_call
    from saccade.runtime import ContextParams, Sampler, load_session, save_session

_HOME = {
    "AttentionCall": "saccade.ops",
    "AttentionOutput": "saccade.core",
    "BadInput": "saccade.core",
    "BlockSelection": "saccade.core",
    "Bytes": "saccade.units",
    "Context": "saccade.hf",
    "ContextParams": "saccade.runtime",
    "Mask": "saccade.core",
    "Sampler": "saccade.runtime",
    "PerHeadFP8": "saccade.core",
    "Unsupported": "saccade.core",
    "attach": "saccade.hf",
    "attend": "saccade.ops",
    "attention": "saccade.ops",
    "compress_context": "saccade.compress",
    "compress_text": "saccade.hf",
    "explain": "saccade.ops",
    "load_model": "saccade.hf",
    "load_session": "saccade.runtime",
    "make_call": "saccade.ops",
    "plan": "saccade.hf",
    "quantize_fp8_per_head": "saccade.core",
    "save_session": "saccade.runtime",
}

__all__ = [*sorted(_HOME), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    globals()[name] = found  # finding it again would cost a short call of attention a tenth
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
