"""The recommendation: the most exact setting that fits, its runner-up, and what else would fit."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Final

from saccade.advice.candidates import RULE, Candidate, candidates
from saccade.advice.evidence import evidence_for, evidence_for_weights, setting_of
from saccade.advice.machine import Machine
from saccade.advice.peak import Memory, memory_of
from saccade.advice.speed import Speed
from saccade.core import BadInput
from saccade.runtime.auto_scaling import reaching
from saccade.runtime.layers import without_own_dtype
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.weights import ROUNDED
from saccade.units import as_bytes, significant

ANSWER: Final = 256
"""Tokens of an answer, by which the time of two settings is compared."""
_MOST_TOKENS: Final = 1 << 27


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A setting with what it takes.

    Attributes:
        candidate: what it is; memory: its bytes.
        speed: None where it was not worth estimating, since it does not fit.
        quality: what is known of how far outputs move, a sentence.
        scaling: what is done about a length beyond the training, a sentence.
    """

    candidate: Candidate
    memory: Memory
    fits: bool
    speed: Speed | None
    quality: str
    scaling: str | None

    @property
    def name(self) -> str:
        """The setting and, where it is not the default, the size of a chunk."""
        size = self.candidate.params.n_batch
        chunked = "" if size == ContextParams().n_batch else f", chunks of {size}"
        return self.candidate.name + chunked


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """Tokens of context that fit into the memory, None for any number."""

    setting: str
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to do.

    Attributes:
        chosen: None where nothing fits.
        second: the runner-up, and why it is one; None where nothing else fits.
        options: every setting that was looked at, the most exact first.
        longest: what would fit if another length were asked.
    """

    blueprint: Blueprint
    machine: Machine
    tokens: int
    chosen: Option | None
    second: Option | None
    why_second: str
    options: tuple[Option, ...]
    longest: tuple[Longest, ...]
    notes: tuple[str, ...] = field(default=())
    rule: str = RULE

    def held(self, each: Candidate) -> Blueprint:
        """The model with its weights as a candidate has them."""
        return self.blueprint if each.weights is None else self.blueprint.holding(each.weights)

    def by_weights(self, asked: str) -> list[tuple[str, Advice]]:
        """(form of the weights, the advice about the settings with it) for every form."""
        forms = dict.fromkeys(each.candidate.weights for each in self.options)
        return [
            (
                form or asked,
                replace(
                    self, options=tuple(o for o in self.options if o.candidate.weights == form)
                ),
            )
            for form in forms
        ]


def advise(
    blueprint: Blueprint,
    asked: ContextParams,
    tokens: int,
    machine: Machine,
    *,
    chunk_is_asked: bool = False,
    may_round: bool = False,
) -> Advice:
    """The advice for a prompt of `tokens` tokens in the memory of a machine.

    Args:
        may_round: whether weights may be rounded to 8 or 4 bits where memory is short.

    Raises:
        BadInput: a length below 1, or more bytes than can be counted.
    """
    if tokens < 1:
        raise BadInput(f"a plan needs a context of at least 1 token, got {tokens}.")
    facts = blueprint.facts
    smaller = _smaller(blueprint) if may_round and machine.kind == "cpu" else ()
    found = [
        _option(blueprint, each, tokens, machine)
        for each in candidates(
            facts, asked, machine.kind, tokens, chunk_is_asked=chunk_is_asked, weights=smaller
        )
    ]
    found = _distinct(found)
    fitting = _timed([each for each in found if each.fits], blueprint, tokens, machine)
    chosen, second = (*fitting, None, None)[:2]
    shown = {each.name: each for each in fitting}
    options = tuple(shown.get(each.name, each) for each in found)
    economic = min(found, key=lambda each: each.memory.peak)
    looked_at = {each.name: each for each in (found[0], chosen or found[0], economic)}
    longest = tuple(
        Longest(setting=name, tokens=_longest(_held(blueprint, each.candidate), each, machine))
        for name, each in looked_at.items()
    )
    return Advice(
        blueprint=blueprint, machine=machine, tokens=tokens, chosen=chosen, second=second,
        why_second=_why(chosen, second), options=options, longest=longest,
        notes=_notes(blueprint, machine, chosen),
    )  # fmt: skip


def _smaller(blueprint: Blueprint) -> tuple[str, ...]:
    """Forms that the weights could be rounded to, and that take less than they do."""
    now = blueprint.weights_bytes
    return tuple(each for each in ROUNDED if blueprint.holding(each).weights_bytes < now)


def _held(blueprint: Blueprint, each: Candidate) -> Blueprint:
    """The model with its weights as a candidate has them."""
    return blueprint if each.weights is None else blueprint.holding(each.weights)


def _option(blueprint: Blueprint, each: Candidate, tokens: int, machine: Machine) -> Option:
    blueprint = _held(blueprint, each)
    asked = without_own_dtype(each.params, blueprint.facts.dtype)
    params, scaling = reaching(asked, blueprint.facts, tokens)
    memory = memory_of(blueprint, params, tokens, machine.kind)
    return Option(
        candidate=replace(each, params=params), memory=memory, speed=None, scaling=scaling,
        fits=memory.peak <= machine.budget, quality=quality_of(params, tokens, blueprint.held),
    )  # fmt: skip


def quality_of(params: ContextParams, tokens: int, held: str = "plain") -> str:
    """What is known of how far outputs move under these options and with weights held so."""
    keys = "exact: the keys that the model computes, all of them"
    if setting_of(params) is not None:
        found = evidence_for(params, tokens)
        keys = "no record of what it costs" if found is None else str(found)
    return keys if held == "plain" else f"{keys}; weights: {quality_of_weights(held)}"


def quality_of_weights(held: str) -> str:
    """What is known of how far outputs move with weights held so (or "f32", "bf16")."""
    if held in ("plain", "f32"):
        return "exact: the numbers of the file" + (", as float32" if held == "f32" else "")
    found = evidence_for_weights(held)
    return "no record of what they cost" if found is None else str(found)


def _distinct(found: list[Option]) -> list[Option]:
    """Of sizes of chunks, which change no result, the largest that fits, or the smallest."""
    kept: dict[str, Option] = {}
    for each in found:
        before = kept.get(each.candidate.name)
        if before is None or not before.fits:
            kept[each.candidate.name] = each
    return list(kept.values())


def _timed(
    fitting: list[Option], blueprint: Blueprint, tokens: int, machine: Machine
) -> list[Option]:
    """The first two of what fits, with their speeds."""
    return [
        replace(
            each,
            speed=machine.speed(_held(blueprint, each.candidate), each.candidate.params, tokens),
        )
        for each in fitting[:2]
    ]


def seconds(option: Option) -> float:
    """Until an answer of ANSWER tokens is there."""
    assert option.speed is not None
    return option.speed.first_token + ANSWER / option.speed.tokens_per_second


def _why(chosen: Option | None, second: Option | None) -> str:
    if chosen is None or second is None:
        return ""
    faster = seconds(chosen) / seconds(second)
    saved = chosen.memory.peak - second.memory.peak
    memory = f"saves {as_bytes(saved)}" if saved > 0 else f"takes {as_bytes(-saved)} more"
    pace = f"{significant(max(faster, 1 / faster), 2)} times {'faster' if faster > 1 else 'slower'}"
    return f"further down in the rule, {memory}, about {pace}"


def _longest(blueprint: Blueprint, option: Option, machine: Machine) -> int | None:
    """Most tokens that fit, to about a hundredth; None where there is no limit."""
    params = option.candidate.params
    params = replace(params, n_ctx=None, rope_scaling_type=None, rope_freq_scale=None)

    def peak(tokens: int, exact: bool = False) -> int:
        return memory_of(blueprint, params, tokens, machine.kind, exact=exact).peak

    low = 1
    while low < _MOST_TOKENS and peak(low) <= machine.budget:
        low *= 2
    if low >= _MOST_TOKENS:
        return None
    most = bisect_right(range(1, low), machine.budget, key=peak)
    most = most // 64 * 64 if most > 1024 else most
    while most and peak(most, exact=True) > machine.budget:  # caches grow in steps
        most -= max(1, most // 8192 * 64)
    return most


def _notes(blueprint: Blueprint, machine: Machine, chosen: Option | None) -> tuple[str, ...]:
    said: list[str] = []
    if machine.busy:
        said.append(
            "this machine was busy while it was timed: times are rough, and the next plan measures "
            "again."
        )
    if blueprint.weights_bytes > machine.budget:
        said.append(
            f"the weights alone take {as_bytes(blueprint.weights_bytes)} in "
            f"{', '.join(blueprint.kinds()) or str(blueprint.facts.dtype).removeprefix('torch.')}."
        )
    if chosen is None and blueprint.held == "plain" and blueprint.facts.dtype.itemsize > 2:
        half = as_bytes(blueprint.weights * 2)
        said.append(f"--dtype bf16 makes the weights {half} (their rounding is not measured here).")
    return tuple(said)
