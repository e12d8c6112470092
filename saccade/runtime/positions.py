"""How a model tells positions apart, and how long a text they reach to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from saccade.rope import DynamicNTK, Rule, Unscaled, YaRN

_UNSCALED: Final = Unscaled()


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """How a model tells positions apart.

    Attributes:
        rule: RoPE scaling that its full-attention layers are configured with; None for a model
            without rotary positions.
        base: of the rotary frequencies, None where it is not known.
        limit: tokens that a table with a row for each position has room for (GPT-2); None: no end.
        refusal: why rotary positions cannot be scaled here, a sentence; None where they can.
    """

    rule: Rule | None = _UNSCALED
    base: float | None = None
    limit: int | None = None
    refusal: str | None = None

    @property
    def rotary(self) -> bool:
        """Whether positions rotate queries and keys."""
        return self.rule is not None

    def reach(self, n_ctx_train: int) -> int:
        """Tokens that the model was trained for, its configured scaling counted.

        Args:
            n_ctx_train: what its config says (`max_position_embeddings`).  YaRN configs say there
                either the length before scaling (Qwen2.5) or after it (DeepSeek-V3).
        """
        if isinstance(self.rule, YaRN | DynamicNTK):
            scaled = int(self.rule.factor * self.rule.original_max_position)
            return max(n_ctx_train, scaled)
        return n_ctx_train


ROTARY: Final = Positions()
"""Rotary positions without scaling, of which nothing else is known."""
