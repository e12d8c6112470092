"""Block-sparse patterns: which blocks of keys each block of queries attends to.

A new pattern is one file and one line in PATTERNS, where the contract test finds it.
"""

from saccade.sparse.big_bird import BigBird
from saccade.sparse.block_topk import BlockTopK
from saccade.sparse.block_topp import BlockTopP
from saccade.sparse.choice import Choice
from saccade.sparse.dilated import Dilated
from saccade.sparse.flash_prefill import FlashPrefill
from saccade.sparse.from_length import FromLength
from saccade.sparse.kascade import Kascade
from saccade.sparse.kascade_plan import KascadePlan
from saccade.sparse.pattern import Pattern, RulePattern, summary_of
from saccade.sparse.prompt import PromptPattern, followed_by
from saccade.sparse.quest import Quest
from saccade.sparse.strided import Strided
from saccade.sparse.triangle_mix import TriangleMix
from saccade.sparse.vertical_slash import VerticalSlash
from saccade.sparse.xattention import XAttention

PATTERNS: dict[str, type[Pattern]] = {
    "strided": Strided,
    "block_topk": BlockTopK,
    "block_topp": BlockTopP,
    "quest": Quest,
    "kascade": Kascade,
    "triangle_mix": TriangleMix,
    "dilated": Dilated,
    "big_bird": BigBird,
    "flash_prefill": FlashPrefill,
    "xattention": XAttention,
    "vertical_slash": VerticalSlash,
}
"""Name on the command line -> pattern."""

__all__ = [
    "PATTERNS",
    "BigBird",
    "BlockTopK",
    "BlockTopP",
    "Choice",
    "Dilated",
    "FlashPrefill",
    "FromLength",
    "Kascade",
    "KascadePlan",
    "Pattern",
    "PromptPattern",
    "Quest",
    "RulePattern",
    "Strided",
    "TriangleMix",
    "VerticalSlash",
    "XAttention",
    "followed_by",
    "summary_of",
]
