"""Block-sparse patterns: which blocks of keys each block of queries attends to.

A new pattern is one file and one line in PATTERNS, where the contract test finds it.
"""

from saccade.sparse.block_topk import BlockTopK
from saccade.sparse.pattern import Pattern
from saccade.sparse.strided import Strided

PATTERNS: dict[str, type[Pattern]] = {"strided": Strided, "block_topk": BlockTopK}
"""Name on the command line -> pattern."""

__all__ = ["PATTERNS", "BlockTopK", "Pattern", "Strided"]
