"""PyramidKV (arXiv 2406.02069): early layers keep more keys than late ones."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.compress.snapkv import SnapKV


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last.

    Early layers attend to many keys, late ones to few.  The last layer keeps a `beta`-th of the
    mean, but not less than the window, where kvpress gives all layers the same budget.

    Args:
        window, kernel, sinks: as SnapKV.
        beta: how steep the pyramid is, at least 1.
    """

    beta: float = 20

    def layer_budget(self, kept: int, length: int, layer: int, layers: int) -> int:
        """Keys that a head of a layer keeps, `kept` on average over the layers."""
        if layers == 1:
            return kept
        highest = max(kept, length - self.window)
        least = max(kept / self.beta, min(self.window, kept), 2 * kept - highest)
        most = 2 * kept - least
        return max(1, min(length, round(most - layer * (most - least) / (layers - 1))))
