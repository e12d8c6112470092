"""Choosing blocks of keys by summaries of them: rules, summaries, and the selection itself."""

from saccade.ops.selection.rule import BlockRule, SummaryKind
from saccade.ops.selection.select import select_blocks
from saccade.ops.selection.summaries import summarize, summary_width

__all__ = ["BlockRule", "SummaryKind", "select_blocks", "summarize", "summary_width"]
