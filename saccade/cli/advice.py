"""The advice of `saccade plan` as text and as JSON, and the command that it recommends."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saccade.cli.shared_options import CONTEXT
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.advice.candidates import Candidate
    from saccade.advice.recommend import Advice, Longest, Option
    from saccade.runtime.plan_blueprint import Blueprint

Said = Mapping[str, str]
"""--model, --device, --dtype and --weights as given, and the kind of device planned for."""
_DEFAULTS = {"device": "auto", "dtype": "auto", "weights": "file"}


def command(candidate: Candidate, said: Said) -> str:
    """The `saccade generate` that runs under these options."""
    from saccade.advice.candidates import changed

    params, words = candidate.params, ["saccade", "generate", "-m", said["model"]]
    said = {**said, "weights": candidate.weights or said["weights"]}
    for name, default in _DEFAULTS.items():
        words += [] if said[name] == default else [f"--{name}", said[name]]
    options = {option.field: option for option in CONTEXT}
    given = changed(params)
    if said["kind"] == "cuda":  # the command would read more at once than the default of a Context
        given = {"n_batch": params.n_batch, **given}
    for field, value in given.items():
        if field == "rope_freq_scale":
            words += ["--rope-scale", f"{1 / float(str(value)):g}"]
        elif field in options:
            words += [options[field].flags[0], _as_word(value)]
    return shlex.join([*words, "-f", "FILE"])


def _as_word(value: object) -> str:
    """A value as its option reads it."""
    from saccade.sparse import PATTERNS

    if isinstance(value, bool):
        return "on" if value else "off"
    named = (name for name, pattern in PATTERNS.items() if type(value) is pattern)
    return next(named, str(value))


def as_text(advice: Advice, said: Said, trials: Sequence[Any] = ()) -> str:
    """The advice for people."""
    said = {**said, "kind": advice.machine.kind}
    return "\n".join(_lines(advice, said, trials))


def _lines(advice: Advice, said: Said, trials: Sequence[Any]) -> Iterator[str]:
    facts, machine = advice.blueprint.facts, advice.machine
    trained = facts.n_ctx_train
    beyond = f", {advice.tokens / trained:.1f} times the {trained:,} it was trained for"
    yield f"{facts.name}, {advice.tokens:,} tokens{beyond if advice.tokens > trained else ''}"
    yield f"on {machine.name}, {as_bytes(machine.budget)} ({machine.said})"
    yield ""
    if advice.chosen is None:
        yield from _nothing(advice)
    else:
        yield from _chosen(advice, advice.chosen, said)
    yield ""
    yield from _table(advice)
    yield ""
    yield "If less were asked:"
    yield from (f"  {_longest(each, advice)}" for each in advice.longest)
    yield from (f"  {note}" for note in advice.notes)
    if trials:
        yield ""
        yield from _trials(trials)


def _chosen(advice: Advice, option: Option, said: Said) -> Iterator[str]:
    memory, speed = option.memory, option.speed
    assert speed is not None
    yield f"  {command(option.candidate, said)}"
    yield ""
    yield f"setting      {option.name}"
    activations = as_bytes(memory.activations)
    yield f"peak         {as_bytes(memory.peak)}: weights {as_bytes(memory.weights)}, " + (
        f"caches {as_bytes(memory.reading)}, activations {activations}"
    )
    yield f"weights      {weights_said(advice.held(option.candidate))}"
    if memory.caches != memory.reading:
        yield f"             caches {as_bytes(memory.caches)} once the prompt is read"
    if memory.host:
        yield f"             of the caches {as_bytes(memory.host)} are in host memory"
    yield f"first token  after {_seconds(speed.first_token)}"
    yield f"then         {significant(speed.tokens_per_second)} tokens/s"
    yield f"quality      {option.quality}"
    if option.scaling:
        yield f"positions    {option.scaling}"
    elif advice.tokens > advice.blueprint.facts.n_ctx_train:
        yield "positions    those inside the cache (StreamingLLM); text before them is forgotten"
    if advice.second is None:
        yield "runner-up    none: nothing else fits"
    else:
        yield f"runner-up    {advice.second.name}: {advice.why_second}"
    yield f"rule         {advice.rule}"


def weights_said(blueprint: Blueprint) -> str:
    """What the weights are in memory."""
    kinds = ", ".join(blueprint.kinds()) or str(blueprint.facts.dtype).removeprefix("torch.")
    if blueprint.held == "plain":
        return kinds
    return f"{kinds}{' as in the file' if blueprint.held == 'file' else ', rounded by loading'}"


def _nothing(advice: Advice) -> Iterator[str]:
    smallest = min(advice.options, key=lambda each: each.memory.peak)
    missing = smallest.memory.peak - advice.machine.budget
    yield (
        f"Nothing fits: the smallest, {smallest.name}, needs {as_bytes(smallest.memory.peak)}, "
        + (f"{as_bytes(missing)} more than there is.")
    )


def _table(advice: Advice) -> Iterator[str]:
    names = [each.name for each in advice.options]
    width = max(map(len, ("setting", *names)))
    yield f"{'setting':<{width}}  {'peak':>9}  fits"
    for name, each in zip(names, advice.options, strict=True):
        yield f"{name:<{width}}  {as_bytes(each.memory.peak):>9}  {'yes' if each.fits else 'no'}"


def _longest(longest: Longest, advice: Advice) -> str:
    trained = advice.blueprint.facts.n_ctx_train
    if longest.tokens is None:
        return f"{longest.setting}: any length fits (beyond the window text is forgotten)"
    if longest.tokens == 0:
        return f"{longest.setting}: no context fits"
    if longest.tokens <= trained:
        return f"{longest.setting}: {longest.tokens:,} tokens fit"
    return (
        f"{longest.setting}: {trained:,} tokens, all it was trained for, fit; memory would hold "
        f"{longest.tokens:,}, with positions scaled"
    )


def _trials(trials: Sequence[Any]) -> Iterator[str]:
    width = max(len(each.name) for each in trials)
    yield f"Measured on the model with {trials[0].tokens:,} tokens:"
    yield f"{'setting':<{width}}  {'peak':>9}  first token  tokens/s"
    for each in trials:
        yield (
            f"{each.name:<{width}}  {as_bytes(each.peak):>9}  {_seconds(each.first_token):>11}  "
            f"{significant(each.tokens_per_second):>8}"
        )


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{significant(seconds, 2)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def as_json(advice: Advice, said: Said, trials: Sequence[Any] = ()) -> dict[str, Any]:
    """The advice for programs; bytes, seconds, tokens."""
    facts, machine = advice.blueprint.facts, advice.machine
    said = {**said, "kind": machine.kind}
    return {
        "schema": "saccade.plan/1",
        "model": facts.name,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "weights": {"kinds": advice.blueprint.kinds(), "bytes": advice.blueprint.weights_bytes},
        "context": advice.tokens,
        "trained_length": facts.n_ctx_train,
        "device": {"kind": machine.kind, "name": machine.name},
        "memory": {"bytes": machine.budget, "from": machine.said},
        "command": None if advice.chosen is None else command(advice.chosen.candidate, said),
        "chosen": None if advice.chosen is None else _option(advice.chosen, said),
        "runner_up": None if advice.second is None else _option(advice.second, said),
        "why_runner_up": advice.why_second or None,
        "rule": advice.rule,
        "settings": [_option(each, said) for each in advice.options],
        "longest": {each.setting: each.tokens for each in advice.longest},
        "notes": list(advice.notes),
        "measured": [each.values() for each in trials],
    }


def _option(option: Option, said: Said) -> dict[str, Any]:
    memory, speed = option.memory, option.speed
    return {
        "setting": option.name,
        "weights": option.candidate.weights or said["weights"],
        "command": command(option.candidate, said),
        "fits": option.fits,
        "peak_bytes": memory.peak,
        "weights_bytes": memory.weights,
        "cache_bytes": memory.caches,
        "reading_cache_bytes": memory.reading,
        "activation_bytes": memory.activations,
        "host_bytes": memory.host,
        "first_token_s": None if speed is None else speed.first_token,
        "tokens_per_s": None if speed is None else speed.tokens_per_second,
        "quality": option.quality,
        "scaling": option.scaling,
    }
