"""Ada-KV (arXiv 2407.11550): the heads of a layer share one budget."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.compress.expected_attention import ExpectedAttention
from saccade.compress.snapkv import SnapKV


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSnapKV(SnapKV):
    """SnapKV with one budget a layer, shared by its heads by score.

    Heads that attend to a few keys keep fewer than heads that attend to many.  The cache is ragged.

    Args:
        window, kernel, sinks: as SnapKV.
        floor: share of the budget that every head keeps.
    """

    floor: float | None = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaExpectedAttention(ExpectedAttention):
    """ExpectedAttention with one budget a layer, shared by its heads by score.

    Args:
        future, sinks: as ExpectedAttention.
        epsilon: added to each weight before it is multiplied by the size of the value, so that
            heads whose keys are all unlikely still compare them by their values; kvpress' choice.
        floor: share of the budget that every head keeps.
    """

    epsilon: float = 1e-2
    floor: float | None = 0.2
