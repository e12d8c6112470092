"""What compares rows with each other: divergence from the exact row, needles, ratios."""

from __future__ import annotations

from typing import Final

import torch

from saccade.evals import quality
from saccade.evals.measure import Seen, fill_divergence, fill_perplexity, finite
from saccade.evals.rows import SDPA, TEXTBOOK
from saccade.report.comparison import Row

_ROUNDING: Final = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING: Final = 3e-2
"""KL between two orders of summation in half precision stays far below."""


class Judge:
    """Takes in rows as they are measured and fills in what they are compared by.

    Args:
        exact: name of the row whose predictions the others should reproduce.
        dtype: of the model.

    Attributes:
        exact: the row that was taken, which is the textbook where sdpa computes something else.
    """

    def __init__(self, exact: str, dtype: torch.dtype) -> None:
        self.exact = exact
        self._rounding = _ROUNDING.get(dtype, _HALF_ROUNDING)
        self._rows: dict[str, tuple[Row, Seen]] = {}
        self._log_probs: torch.Tensor | None = None

    def add(self, row: Row, seen: Seen) -> None:
        """A row that has been measured."""
        fill_perplexity(row, seen)
        self._rows[row.name] = row, seen
        if self._log_probs is None and row.name == self.exact:
            self._settle()
        elif self._log_probs is not None:
            self._compare(row, seen)

    def settle(self) -> None:
        """Where the exact row was not measured, the first one stands for it."""
        if self._log_probs is None and self._rows:
            self.exact = next(iter(self._rows))
            self._settle()

    def finish(self, reference: str) -> None:
        """Errors of the ratios to the perplexity of the row that users have."""
        if reference not in self._rows:
            return
        theirs = self._rows[reference][1].nll
        for row, seen in self._rows.values():
            if row.name != reference:
                row.perplexity_ratio_se = finite(quality.ratio_error(seen.nll, theirs))

    def _settle(self) -> None:
        """From now on the exact row is known."""
        if self.exact == SDPA and TEXTBOOK in self._rows:
            self._check_sdpa()
        self._log_probs = self._rows[self.exact][1].log_probs
        for row, seen in self._rows.values():
            self._compare(row, seen)

    def _check_sdpa(self) -> None:
        """Whether transformers' sdpa computes this model at all: it leaves soft caps out."""
        eager, (row, sdpa) = self._rows[TEXTBOOK][1], self._rows[SDPA]
        assert eager.log_probs is not None and sdpa.log_probs is not None
        apart = quality.divergence(sdpa.log_probs, eager.log_probs).kl
        if not apart <= self._rounding:
            self.exact = TEXTBOOK
            row.note = (
                f"differs from the model's own attention by a KL of {apart:.2g}: sdpa leaves out "
                "something of this model, so that the others are compared with eager attention"
            )

    def _compare(self, row: Row, seen: Seen) -> None:
        exact = self._rows[self.exact][1]
        assert self._log_probs is not None
        fill_divergence(row, seen, self._log_probs)
        asked = [mine for mine, known in zip(seen.answers, exact.answers, strict=True) if known]
        row.needle_trials = len(asked)
        row.needle = sum(asked) / len(asked) if asked else None
