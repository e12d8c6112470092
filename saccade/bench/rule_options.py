"""What `saccade bench tune` does on a CPU: measure rules, write them, say how they are used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from saccade.bench import cpu_rules
from saccade.bench.cpu_rules import Timer, timed
from saccade.bench.options import threads_set
from saccade.bench.rule_cases import Series, all_series
from saccade.core import BadInput
from saccade.core.hardware import processor_family
from saccade.ops.tuning import rules as tuning
from saccade.ops.tuning.rules import Rule, RuleFile
from saccade.report.files import write_whole
from saccade.report.record import Record, origin

SCHEMA = "saccade.cpu-rules/1"
DIMS = (64, 128)
BUDGET, QUICK_BUDGET = 0.5, 0.1  # seconds of samples for each backend and size


@dataclass(slots=True, kw_only=True)
class RuleRecord(Record):
    """The figures behind a family's rules; `complete` is False after Ctrl-C."""

    family: str
    what: str = "milliseconds of each backend that `auto` could take, the fastest sample"
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    complete: bool = True
    schema: str = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure and where it goes.

    Attributes:
        dims: head dimensions; each stands for those around it.
        quick: fewer lengths and samples.
        cases: only series with one of these words in their name; none for all.
        budget: seconds of samples for each backend and size; default by `quick`.
        threads: of torch and the kernels; default torch's own.
        out: the rules; default the user's file, which `auto` reads.
        json: a record of the figures, which the rules then cite.
    """

    dims: Sequence[int] = DIMS
    quick: bool = False
    cases: Sequence[str] = ()
    budget: float | None = None
    threads: int | None = None
    out: str | None = None
    json: str | None = None


def execute(options: Options, timer: Timer = timed) -> int:
    """Measure every series, writing the rules after each; show the figures.

    Returns:
        0; 1 where a backend was wrong or nothing could be compared; 130 after Ctrl-C.
    """
    family = processor_family()
    path = Path(options.out).expanduser() if options.out else tuning.user_path(family)
    with threads_set(options.threads):
        record = RuleRecord(**origin(), family=family)
        rules: list[Rule] = []
        try:
            _measure(options, path, record, rules, timer)
        except KeyboardInterrupt:
            record.complete = False
    if options.json:
        record.write(Path(options.json).expanduser())
    tuning.clear_cache()
    _show(record)
    return _ended(record, rules, path, used_at_once=not options.out)


def _selected(options: Options) -> list[Series]:
    """The series that are measured.

    Raises:
        BadInput: a word that is in no name.
    """
    series = all_series(options.dims, quick=options.quick)
    for word in options.cases:
        if not any(word in each.name for each in series):
            kinds = "; ".join(dict.fromkeys(each.name for each in series))
            raise BadInput(f"no call has {word!r} in its name; there are: {kinds}.")
    words = options.cases or ("",)
    return [each for each in series if any(word in each.name for word in words)]


def _measure(
    options: Options, path: Path, record: RuleRecord, rules: list[Rule], timer: Timer
) -> None:
    budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    source = Path(options.json).stem if options.json else f"measured {record.date[:10]}"
    series = _selected(options)
    for at, each in enumerate(series, 1):
        print(f"[{at}/{len(series)}] {each.name}", file=sys.stderr, flush=True)
        figures = list(cpu_rules.measure(each, budget=budget, timer=timer))
        record.rows += [cpu_rules.as_trial(each, size) for size in figures]
        rules += cpu_rules.rules_of(each, figures, source)
        if rules:
            _write(path, record, rules, with_trials=not options.json)


def _write(path: Path, record: RuleRecord, rules: Sequence[Rule], *, with_trials: bool) -> None:
    """The file so far; the figures stand in it where no record holds them.

    Raises:
        BadInput: it cannot be written.
    """
    names = ("revision", "command", "environment", "date")
    measured = {name: value for name, value in asdict(record).items() if name in names}
    trials = record.rows if with_trials else []
    file = RuleFile(
        rules=tuple(replace(rule, place="") for rule in rules), architecture=record.family,
        measured=measured, trials=trials,
    )  # fmt: skip
    try:
        if path == tuning.user_path(record.family):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, tuning.to_json(file))
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written ({error.strerror}). Choose a file with --out."
        ) from error


def _show(record: RuleRecord) -> None:
    from rich.text import Text

    from saccade.bench.rule_table import as_table
    from saccade.report.terminal import drawn, to_stdout

    console = to_stdout()
    found = record.environment
    heading = (
        f"{found['cpu']} ({record.family}), {found['threads']} threads, torch {found['torch']}"
    )
    console.print(Text(heading, style="dim"))
    console.print(drawn(as_table(record.rows)))


def _ended(record: RuleRecord, rules: Sequence[Rule], path: Path, *, used_at_once: bool) -> int:
    """Say where the rules are and whether they are used, and give the exit code."""
    wrong = [
        (row["case"], row["dtype"], name, reason)
        for row in record.rows
        for name, reason in row.get("cannot", {}).items()
        if reason.startswith(("WRONG", "failed"))
    ]
    for case, dtype, name, reason in dict.fromkeys(wrong):
        print(f"{name}, {case}, {dtype}: {reason}", file=sys.stderr)
    if rules:
        use = "auto uses them from now on." if used_at_once else f"To use them: {_export(path)}"
        print(f"Wrote {len(rules)} rules for {record.family} to {path}. {use}")
    elif record.complete:
        reasons = {r for row in record.rows for r in row.get("cannot", {}).values()}
        print(f"No rules: nothing could be compared here ({'; '.join(sorted(reasons))}).")
    if not record.complete:
        print("Stopped early: the rules hold what was measured so far.", file=sys.stderr)
        return 130
    return 1 if wrong or not rules else 0


def _export(path: Path) -> str:
    return f"export {tuning.VARIABLE}={path.resolve()}"
