"""`saccade doctor`: what can run here, and what to do about what cannot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from saccade.cli.values import file_name

if TYPE_CHECKING:
    from saccade.cli.health import Check, Verdicts

EXAMPLES = """examples:
  saccade doctor
  saccade doctor -m model.gguf
  saccade doctor --json
"""

_MARKS = {"ok": "ok", "missing": "--", "broken": "!!"}


def run(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="PATH|NAME", parser=file_name,
            help="a model: what its weights would take in each form, and what that costs",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as one line of JSON")] = False,
) -> int:  # fmt: skip
    """What can run here, and what to do about what cannot."""
    from saccade.cli.health import attention_verdicts, checks
    from saccade.cli.weights import forms, table

    weights = [] if model is None else forms(model)
    found = checks()
    usable = not any(check.status == "broken" for check in found)
    backends = attention_verdicts() if usable else []
    if as_json:
        facts = {"checks": [asdict(c) for c in found], "attention": [asdict(v) for v in backends]}
        facts |= {} if model is None else {"weights": [asdict(form) for form in weights]}
        print(json.dumps(facts))
    else:
        _print_checks(found)
        _print_backends(backends)
        if model is not None:
            print(f"\nWeights of {model} in memory\n\n{table(weights)}")
    return 0 if usable else 1


def _print_checks(found: list[Check]) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{_MARKS[check.status]:>3}  {check.name:{width}}  {check.found}")
        if check.advice:
            print(f"{'':{width + 5}}  -> {check.advice}")


def _print_backends(backends: list[Verdicts]) -> None:
    if not backends:
        return
    print("\nAttention: what computes a call\n")
    width = max(len(call.call) for call in backends)
    always = set.intersection(*(set(call.backends.items()) for call in backends))
    for call in backends:
        chosen = next(
            (name for name, said in call.backends.items() if said.startswith("chosen")), "none"
        )
        others = [name for name, said in call.backends.items() if said.startswith("supported")]
        also = f"also possible: {', '.join(others)}" if others else ""
        print(f"  {call.call:{width}}  {chosen:10}  {also}")
        own = {name: said for name, said in call.backends.items() if (name, said) not in always}
        for line in _refusals(own):
            print(textwrap.indent(line, " " * (width + 16)))
    for line in _refusals(dict(sorted(always))):
        print(f"  all of these: {line}")


def _refusals(backends: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the backends that have it."""
    reasons: dict[str, list[str]] = {}
    for name, said in backends.items():
        if said.startswith("cannot"):
            reasons.setdefault(said, []).append(name)
    return [f"{', '.join(names)} {said}" for said, names in reasons.items()]
