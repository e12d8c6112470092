"""Units of a text that are kept or dropped whole: tokens, sentences, chunks of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saccade.core import BadInput

_SENTENCE_END = re.compile(
    r"""(?:[.!?…]+["'”’»)\]]*\s++|[^\S\n]*\n\s*+)(?![a-z])  # not "e.g. this", not a wrapped line
      | [^\S\n]*\n[^\S\n]*\n\s*
      | [。！？]+["”’」』）]*\s*""",
    re.VERBOSE,
)


def sentence_starts(text: str) -> list[int]:
    """The characters at which sentences begin, the first of them 0.

    A sentence ends behind `.`, `!`, `?` or `…` and white space, or with its line, unless a small
    letter follows; behind an empty line; and behind the full stops of Chinese and Japanese.
    """
    ends = (found.end() for found in _SENTENCE_END.finditer(text))
    return [0, *(end for end in ends if end < len(text))]


def keep_units(
    scores: Tensor,
    starts: Sequence[int],
    target_len: int,
    *,
    protected: Tensor | None = None,
) -> Tensor:
    """Positions of the tokens of the best units that fit into `target_len` tokens, ascending.

    A unit's score is the mean over its tokens.  The best unit that still fits is taken, until none
    does; of equal scores the earlier.  With units of one token these are the tokens that
    `compress_context` keeps.

    Args:
        scores: `[n]`, not NaN; +inf: nothing is known of this token.  It does not count in a mean,
            and a unit of such tokens alone comes first.
        starts: the first token of each unit, ascending from 0.
        target_len: most tokens to keep.
        protected: bool `[n]`; units with such a token are kept whatever their score.

    Returns:
        int64 `[at most target_len]`.

    Raises:
        BadInput: protected units alone have more tokens, or not even one unit fits.
    """
    lengths = torch.tensor([b - a for a, b in pairwise([*starts, len(scores)])])
    unit = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    means = _means(scores.double(), unit, len(lengths))
    forced = torch.zeros(len(lengths), dtype=torch.bool)
    if protected is not None:
        forced[unit[protected]] = True
    room = target_len - int(lengths[forced].sum())
    if room < 0:
        raise BadInput(
            f"what is protected has {target_len - room:,} tokens with the units around it, more "
            f"than the {target_len:,} to keep: keep more, protect less, or take smaller units."
        )
    kept = forced.clone()
    for index in means.argsort(descending=True, stable=True).tolist():
        length = int(lengths[index])
        if not forced[index] and length <= room:
            kept[index], room = True, room - length
        if not room:
            break
    if not kept.any():
        raise BadInput(
            f"no unit fits into {target_len:,} tokens, the shortest has {int(lengths.min()):,}: "
            "keep more, or take smaller units."
        )
    return kept[unit].nonzero()[:, 0]


def _means(scores: Tensor, unit: Tensor, count: int) -> Tensor:
    """Mean of the finite scores of each unit `[count]`, +inf where there is none."""
    known = scores != torch.inf
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, unit[known], scores[known])
    counts = torch.bincount(unit[known], minlength=count)
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.inf)
