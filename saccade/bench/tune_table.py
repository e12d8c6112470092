"""What `saccade bench tune` shows: the GPU, a line for each kernel and head dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saccade.bench.tune import Found
from saccade.report.numbers import MISSING, as_time, significant
from saccade.report.table import Cell, Heading, Line, Table
from saccade.report.terminal import drawn

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("in use", "time", "best", "time", "speed", "tried")


def print_found(
    measured: Mapping[str, Any], found: Sequence[Found], console: Console, *, complete: bool
) -> None:
    """Print the GPU, its ceilings and the table."""
    from rich.text import Text

    for line in heading(measured):
        console.print(Text(line, style="dim"))
    console.print()
    console.print(drawn(as_table(found)))
    for each in found:
        for trial in each.trials:
            if trial.status in ("WRONG", "failed"):
                text = f"{trial.status}  {each.kernel} {each.dim}, {trial.launch}: {trial.note}"
                console.print(Text(text, style="bold red"))
    if not complete:
        console.print(Text("Stopped early: the finished rows are shown.", style="dim"))


def as_table(found: Sequence[Found]) -> Table:
    """Green where a faster launch was found, red where none was right."""
    lines: list[Line] = []
    for each in found:
        best = each.best
        better = False if best is None else True if best.launch != each.now else None
        line = [Cell(text, better=better) for text in cells(each)]
        lines.append(Line(f"{each.kernel} {each.dim}", line, "base"))
    return Table([Heading(name, right=name in ("time", "speed")) for name in COLUMNS], lines)


def heading(measured: Mapping[str, Any]) -> list[str]:
    """GPU, versions and ceilings, as lines."""
    found = measured.get("environment", {})
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("torch", "triton", "cuda"))
    lines = [f"{measured.get('gpu')}, {versions}"]
    limits = measured.get("ceilings")
    if limits:
        lines.append(
            f"Ceilings: matrix product {significant(limits['matmul_tflops'])} TFLOP/s, "
            f"reads {significant(limits['read_gbs'])} GB/s"
        )
    return lines


def cells(found: Found) -> list[str]:
    """Texts of a row under COLUMNS."""
    best, before = found.best, found.seconds_now
    tried = f"{sum(t.seconds is not None for t in found.trials)} of {len(found.trials)}"
    now = MISSING if before is None else as_time(before)
    if best is None or best.seconds is None:
        return [str(found.now), now, "none was right", MISSING, MISSING, tried]
    launch = "the same" if best.launch == found.now else str(best.launch)
    gain = MISSING if before is None else f"{before / best.seconds:.2f}x"
    return [str(found.now), now, launch, as_time(best.seconds), gain, tried]
