"""Choosing blocks of keys by summaries of them: rules, summaries, and the selection itself."""

from saccade.ops.selection.mass import block_mass, products
from saccade.ops.selection.rule import BlockRule, SummaryKind
from saccade.ops.selection.select import always_read, select_blocks
from saccade.ops.selection.summaries import summarize, summary_width

__all__ = [
    "BlockRule",
    "SummaryKind",
    "always_read",
    "block_mass",
    "products",
    "select_blocks",
    "summarize",
    "summary_width",
]
