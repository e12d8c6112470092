"""Block-sparse patterns: which blocks of keys each block of queries attends to.

A new pattern is one file and one line in PATTERNS, where the contract test finds it.
"""

from saccade.sparse.block_topk import BlockTopK
from saccade.sparse.block_topp import BlockTopP
from saccade.sparse.choice import Choice
from saccade.sparse.from_length import FromLength
from saccade.sparse.pattern import Pattern, RulePattern, summary_of
from saccade.sparse.quest import Quest
from saccade.sparse.strided import Strided

PATTERNS: dict[str, type[Pattern]] = {
    "strided": Strided,
    "block_topk": BlockTopK,
    "block_topp": BlockTopP,
    "quest": Quest,
}
"""Name on the command line -> pattern."""

__all__ = [
    "PATTERNS",
    "BlockTopK",
    "BlockTopP",
    "Choice",
    "FromLength",
    "Pattern",
    "Quest",
    "RulePattern",
    "Strided",
    "summary_of",
]
