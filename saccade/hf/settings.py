"""What one attention module is told, beyond what transformers itself passes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from saccade.sparse import Pattern

ATTRIBUTE: Final = "saccade_settings"
"""Name under which `attach` leaves the settings on an attention module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """How one attention module computes; the defaults are what the model itself says.

    Attributes:
        backend: a backend of `saccade.attention` by name.
        window, sinks: replace the model's own window; None and 0 leave it as it is.
        sparse: picks blocks of keys for each call.
        needs_own_cache: the options in force live in saccade's caches, so tokens kept by a
            cache of transformers would silently ignore them.
    """

    backend: str = "auto"
    window: int | None = None
    sinks: int = 0
    sparse: Pattern | None = None
    needs_own_cache: bool = False


DEFAULT: Final = AttentionSettings()


def settings_of(module: nn.Module) -> AttentionSettings:
    """The settings that `attach` left on an attention module, or the defaults."""
    return getattr(module, ATTRIBUTE, DEFAULT)
