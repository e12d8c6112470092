"""`saccade doctor`: what can run here, and what to do about what cannot."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from saccade.cli.health import Check, Verdicts

EXAMPLES = """examples:
  saccade doctor
  saccade doctor --json
"""

_MARKS = {"ok": "ok", "missing": "--", "broken": "!!"}


def run(
    as_json: Annotated[bool, typer.Option("--json", help="the same as one line of JSON")] = False,
) -> int:
    """What can run here, and what to do about what cannot."""
    from saccade.cli.health import attention_verdicts, checks

    found = checks()
    usable = not any(check.status == "broken" for check in found)
    backends = attention_verdicts() if usable else []
    if as_json:
        facts = {"checks": [asdict(c) for c in found], "attention": [asdict(v) for v in backends]}
        print(json.dumps(facts))
    else:
        _print_checks(found)
        _print_backends(backends)
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
    for call in backends:
        chosen = next(
            (name for name, said in call.backends.items() if said.startswith("chosen")), "none"
        )
        others = [name for name, said in call.backends.items() if said.startswith("supported")]
        also = f"also possible: {', '.join(others)}" if others else ""
        print(f"  {call.call:{width}}  {chosen:10}  {also}")
        for name, said in call.backends.items():
            if said.startswith("cannot"):
                print(textwrap.indent(f"{name} {said}", " " * (width + 16)))
