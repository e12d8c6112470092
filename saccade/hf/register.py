"""Registering `attn_implementation="saccade"` with transformers."""

from __future__ import annotations

from typing import Final

from transformers import AttentionInterface, AttentionMaskInterface

from saccade.hf.attention import saccade_attention
from saccade.hf.mask import saccade_mask

KEY: Final = "saccade"
"""Must not contain flash, sdpa, flex_attention, / or |: transformers reads meaning into those."""


def register() -> None:
    """Register the attention function and, with it, the mask function.  Harmless to repeat.

    Without the mask function transformers passes no mask at all and padding is silently ignored.
    """
    AttentionInterface.register(KEY, saccade_attention)
    AttentionMaskInterface.register(KEY, saccade_mask)
