"""What `saccade bench tune` shows: the card, one line a kernel and head dimension, what next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saccade.bench.tune import Found
from saccade.report.numbers import MISSING, significant

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("in use", "time", "best", "time", "speed", "tried")


def print_found(
    measured: Mapping[str, Any], found: Sequence[Found], console: Console, *, complete: bool
) -> None:
    """Print the card, its ceilings and the table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for line in heading(measured):
        console.print(Text(line, style="dim"))
    console.print()
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("time", "speed") else "left")
    for each in found:
        best = each.best
        style = "bold red" if best is None else "green" if best.launch != each.now else ""
        name = Text(f"{each.kernel} {each.dim}", style="bold")
        table.add_row(name, *(Text(text, style=style) for text in cells(each)))
    console.print(table)
    for each in found:
        for trial in each.trials:
            if trial.status in ("WRONG", "failed"):
                text = f"{trial.status}  {each.kernel} {each.dim}, {trial.launch}: {trial.note}"
                console.print(Text(text, style="bold red"))
    if not complete:
        console.print(Text("Stopped early: the finished rows are shown.", style="dim"))


def heading(measured: Mapping[str, Any]) -> list[str]:
    """Card, versions and ceilings, as lines."""
    versions = ", ".join(f"{name} {measured.get(name)}" for name in ("torch", "triton", "cuda"))
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
    if best is None or best.seconds is None:
        return [str(found.now), as_time(before), "none was right", MISSING, MISSING, tried]
    launch = "the same" if best.launch == found.now else str(best.launch)
    gain = MISSING if before is None else f"{before / best.seconds:.2f}x"
    return [str(found.now), as_time(before), launch, as_time(best.seconds), gain, tried]


def as_time(seconds: float | None) -> str:
    """Microseconds or milliseconds."""
    if seconds is None:
        return MISSING
    return (
        f"{significant(seconds * 1e6)} µs" if seconds < 1e-3 else f"{significant(seconds * 1e3)} ms"
    )
