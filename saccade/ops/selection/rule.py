"""A rule by which blocks of keys are selected, as numbers that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from saccade.core.check import LARGEST_POSITION, integer

SummaryKind = Literal["none", "mean", "bounds", "keys"]
"""What is known of the keys of a block: nothing, their mean, their maxima and minima, or each."""

SUMMARY_CODES: Final[dict[SummaryKind, int]] = {"none": 0, "mean": 1, "bounds": 2, "keys": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRule:
    """Which blocks of keys a block of queries reads: some always, the best of the others.

    Attributes:
        summary: by what the others are scored; "none": none of them is read.
        q_block, k_block: tokens in a block of queries and of keys.
        sinks: first blocks, always read.
        window: latest blocks, always read; that of the first query of a block counts as one.
        stride: every stride-th block is always read; 0 for none.
        top: how many of the others are read, those with the highest scores.
        share: where above 0 instead of `top`: the fewest of the others that hold this share of the
            attention to them, as their means estimate it.
        least: number of keys below which all blocks are read.

    Raises:
        TypeError, ValueError: numbers out of range, `top` and `share`, or `share` without means.
    """

    summary: SummaryKind
    q_block: int
    k_block: int
    sinks: int
    window: int
    stride: int = 0
    top: int = 0
    share: float = 0.0
    least: int = 0

    def __post_init__(self) -> None:
        for name, least in (("q_block", 1), ("k_block", 1), ("window", 1)):
            integer(name, getattr(self, name), least, LARGEST_POSITION)
        for name in ("sinks", "stride", "top", "least"):
            integer(name, getattr(self, name), 0, LARGEST_POSITION)
        if self.summary not in SUMMARY_CODES:
            raise ValueError(f"summary must be one of {', '.join(SUMMARY_CODES)}.")
        if not 0 <= self.share <= 1 or (self.share and self.top):
            raise ValueError(
                f"share must be in [0, 1], and 0 where top says how many blocks are read, got "
                f"share={self.share} and top={self.top}."
            )

        if self.share and self.summary != "mean":
            raise ValueError(f"share needs the means of blocks, got summary={self.summary!r}.")

    @property
    def reads_all(self) -> bool:
        """Whether all blocks are read, whatever the keys are."""
        return self.share >= 1 or self.stride == 1

    def numbers(self, scale: float) -> tuple[object, ...]:
        """The rule as the C++ kernels read it (csrc/selection_arguments.h)."""
        code = SUMMARY_CODES[self.summary]
        sizes = (self.q_block, self.k_block, self.sinks, self.window, self.stride, self.top)
        return code, *sizes, float(self.share), scale, self.least
