"""The chapter's own figures beside what was measured, and why they differ."""

from __future__ import annotations

from saccade.report.comparison import Report
from saccade.report.numbers import MISSING
from saccade.report.table import Cell, Heading, Line, Table

HEADINGS = ("Quantity", "Claimed", "Measured", "Why they differ")


def claims_table(report: Report) -> Table:
    """One line for each claim, in the order of the record."""
    lines = [
        Line(
            claim.technique,
            [Cell(text or MISSING) for text in
             (claim.quantity, claim.claimed, claim.measured, claim.reason)],
        )
        for claim in report.claims
    ]  # fmt: skip
    return Table([Heading(title, right=False) for title in HEADINGS], lines, "Technique")
