"""Floor 2: where to look.  A Pattern picks blocks of keys for each block of queries.

Adding a pattern is one file and one line in PATTERNS; the contract test finds it there.
"""

from saccade.sparse.block_topk import BlockTopK
from saccade.sparse.pattern import Pattern
from saccade.sparse.strided import Strided

PATTERNS: dict[str, type[Pattern]] = {"strided": Strided, "block_topk": BlockTopK}

__all__ = ["PATTERNS", "BlockTopK", "Pattern", "Strided"]
