"""`auto`: dense attention, or the fastest pattern that keeps the asked recall, by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from saccade.sparse.block_topk import BlockTopK
from saccade.sparse.block_topp import BlockTopP
from saccade.sparse.from_length import FromLength
from saccade.sparse.pattern import RulePattern
from saccade.sparse.probe import Measured, Phase, Probe
from saccade.sparse.quest import Quest

MOST_TIME: Final = 0.9
"""A pattern has to take less than this share of the dense time: a loss of quality has to pay."""


def candidates(length: int, block: int = 64) -> dict[str, RulePattern]:
    """The patterns that `auto` compares for a context of `length` tokens."""
    found: dict[str, RulePattern] = {}
    for share in (16, 8, 4, 2):
        top = max(4, length // block // share)
        found[f"block top-k 1/{share}"] = BlockTopK(block=block, top=top)
        found[f"quest 1/{share}"] = Quest(block=block, top=top)
    for p in (0.9, 0.95, 0.99):
        found[f"block top-p {p}"] = BlockTopP(block=block, p=p)
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` takes.

    Attributes:
        pattern: for `ContextParams(sparse=...)`; None: dense attention.
        why: in a sentence.
        found: what was measured, (candidate, phase, number of keys) -> Measured.
    """

    pattern: RulePattern | None
    why: str
    found: Mapping[tuple[str, Phase, int], Measured]


def choose(probe: Probe, recall: float) -> Choice:
    """The candidate of a probe with the least time that keeps the recall, from its crossover on.

    The crossover of a pattern is the shortest measured length from which on, in prefill and in
    decode, it keeps the recall and takes less than MOST_TIME of the dense time.  Of the patterns
    that have one, the fastest at the longest length is taken; times of prefill and decode count
    alike, as the product of their ratios.
    """
    lengths = sorted({keys for _, _, keys in probe.found})
    if not lengths:
        return Choice(None, "dense: nothing was measured, the text is too short.", probe.found)
    crossovers = {name: _crossover(probe, name, lengths, recall) for name in probe.candidates}
    fitting = {name: at for name, at in crossovers.items() if at is not None}
    if not fitting:
        return Choice(None, _why_dense(probe, lengths[-1], recall), probe.found)
    best = min(fitting, key=lambda name: _speed(probe, name, lengths[-1]))
    pattern = FromLength(pattern=probe.candidates[best], least=fitting[best])
    at = [f"{phase} {probe.found[best, phase, lengths[-1]].ratio:.2f}" for phase in _phases(probe)]
    kept = _recall(probe, best, lengths[-1])
    why = (
        f"{best} from {fitting[best]:,} keys on, dense below: at {lengths[-1]:,} keys it keeps "
        f"{kept:.3f} of the attention's weight (asked {recall:g}) in the dense time x "
        f"{', '.join(at)}."
    )
    return Choice(pattern, why, probe.found)


def _phases(probe: Probe) -> list[Phase]:
    measured = {phase for _, phase, _ in probe.found}
    return [phase for phase in get_args(Phase) if phase in measured]


def _recall(probe: Probe, name: str, keys: int) -> float:
    """The lower one of prefill and decode."""
    return min(probe.found[name, phase, keys].mean_recall for phase in _phases(probe))


def _speed(probe: Probe, name: str, keys: int) -> float:
    product = 1.0
    for phase in _phases(probe):
        product *= probe.found[name, phase, keys].ratio
    return product


def _crossover(probe: Probe, name: str, lengths: list[int], recall: float) -> int | None:
    found = None
    for keys in reversed(lengths):
        ratios = [probe.found[name, phase, keys].ratio for phase in _phases(probe)]
        if max(ratios) >= MOST_TIME or _recall(probe, name, keys) < recall:
            return found
        found = keys
    return found


def _why_dense(probe: Probe, keys: int, recall: float) -> str:
    kept = [name for name in probe.candidates if _recall(probe, name, keys) >= recall]
    if not kept:
        best = max(probe.candidates, key=lambda name: _recall(probe, name, keys))
        return (
            f"dense: at {keys:,} keys no pattern keeps {recall:g} of the attention's weight; "
            f"{best} keeps {_recall(probe, best, keys):.3f}."
        )
    best = min(kept, key=lambda name: _speed(probe, name, keys))
    times = ", ".join(f"{p} {probe.found[best, p, keys].ratio:.2f}" for p in _phases(probe))
    return (
        f"dense: at {keys:,} keys the fastest pattern that keeps {recall:g} of the attention's "
        f"weight, {best}, takes the dense time x {times}, and {MOST_TIME:g} is the most that pays."
    )
