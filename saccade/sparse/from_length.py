"""A pattern for long contexts alone: below a number of keys everything is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from saccade.ops.selection import BlockRule
from saccade.sparse.pattern import RulePattern
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class FromLength(RulePattern):
    """Dense attention below `least` keys, another pattern from there on.

    Args:
        pattern: what is read of longer contexts.
        least: number of keys.

    Raises:
        TypeError, ValueError: a pattern without a rule, `least` below 0.
    """

    pattern: RulePattern
    least: int

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, RulePattern):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"FromLength.pattern must be a RulePattern, got {self.pattern!r}.")
        check_sizes(self, least=0)

    @property
    def rule(self) -> BlockRule:
        """See RulePattern."""
        return replace(self.pattern.rule, least=self.least)
