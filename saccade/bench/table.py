"""The human card: machine, ceilings, one table with ratios and bars, and what it adds up to."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from saccade.bench.peers import PEERS, QUOTED
from saccade.bench.reads import READS, TITLE
from saccade.bench.record import BarResult, Record, Row
from saccade.report.numbers import MISSING, as_duration, as_ratio, significant

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

BASES = {"prefill": "fp32", "decode": "bf16"}  # what the other storage types are compared with
COLUMNS = ("time", "rate", "of ceiling", "vs torch", "vs base", "bars")


def print_record(record: Record, console: Console) -> None:
    """Print the card.  Names from the record are never read as markup."""
    from rich.text import Text

    for line in heading(record):
        console.print(Text(line, style="dim"))
    console.print()
    console.print(_table(record))
    console.print()
    for row in record.rows:
        if row.status != "ok":
            style = "dim" if row.status == "cannot" else "bold red"
            console.print(Text(f"{row.status}  {row.case}, {title(row)}: {row.note}", style=style))
    for line in closing(record):
        console.print(Text(line, style="dim"))


def heading(record: Record) -> list[str]:
    """Machine and ceilings, as lines."""
    machine, ceilings = record.machine, record.ceilings
    target = f", kernels for {ceilings.target}" if ceilings.target else ""
    threads = f"{ceilings.threads} thread{'s' if ceilings.threads != 1 else ''}"
    return [
        f"{machine.get('cpu')}, {threads}{target}, torch {machine.get('torch')}",
        f"Ceilings: FMA {significant(ceilings.fma_peak / 1e9)} GF/s, "
        f"reads {significant(ceilings.read_bandwidth / 1e9)} GB/s, by {ceilings.source}",
    ]


def closing(record: Record) -> list[str]:
    """What it adds up to, and what to keep in mind."""
    results = [bar for row in record.rows for bar in row.bars]
    met = sum(bar.met is True for bar in results)
    unknown = sum(bar.met is None for bar in results)
    lines = [f"{met} of {len(results)} bars met" + (f", {unknown} not measured" if unknown else "")]
    lines[0] += f"; {as_duration(record.seconds)}."
    if not record.complete:
        lines.append("Stopped early: the finished rows are shown.")
    if record.ceilings.was_busy:
        lines.append(
            "The machine was busy: its ceilings varied by more than 15 % during the run. "
            "Trust ratios between rows, not shares of a ceiling."
        )
    if any(row.work == "prefill" for row in record.rows):
        lines.append(QUOTED)
    return lines


def title(row: Row) -> str:
    """Who computed a row, as people call it."""
    if row.backend == READS:
        return TITLE
    return f"saccade {row.backend}" if row.ours else PEERS[row.backend].title


def cells(row: Row, record: Record) -> list[str]:
    """Texts of a row under COLUMNS without the bars."""
    if row.seconds is None:
        return [row.status, *[MISSING] * 4]
    torch_row, base = record.find(row.case, "torch"), _base(row, record)
    faster = (
        as_ratio(torch_row.seconds / row.seconds)
        if row.ours and torch_row is not None and torch_row.seconds
        else ""
    )
    against = ""
    if base is not None and base is not row and base.seconds:
        # Decoding is spoken of in tokens a second, everything else in time.
        ratio = base.seconds / row.seconds if row.work == "decode" else row.seconds / base.seconds
        what = "tokens/s" if row.work == "decode" else "time"
        against = f"{as_ratio(ratio)} {what}"
    return [as_time(row), *_rates(row, record), faster, against]


def _base(row: Row, record: Record) -> Row | None:
    storage = BASES.get(row.work)
    return record.find(f"{row.group} {storage}", row.backend) if storage and row.ours else None


def _rates(row: Row, record: Record) -> tuple[str, str]:
    """Rate, and the share of whichever ceiling is the nearer one for this case."""
    assert row.seconds is not None and row.flop_rate is not None and row.byte_rate is not None
    by_fma = row.flops / record.ceilings.fma_peak / row.seconds
    by_reads = row.nbytes / record.ceilings.read_bandwidth / row.seconds
    is_decode = row.work == "decode"
    rate, unit = (row.byte_rate, "GB/s") if is_decode else (row.flop_rate, "GF/s")
    limit = "FMA" if by_fma >= by_reads else "reads"
    return f"{significant(rate / 1e9)} {unit}", f"{100 * max(by_fma, by_reads):.0f} % {limit}"


def as_time(row: Row) -> str:
    """`171 ms ±2 %`: the median, and half the distance of the quartiles."""
    assert row.seconds is not None and row.spread is not None
    millis = 1e3 * row.seconds
    shown = f"{significant(millis)} ms" if millis < 10_000 else f"{significant(row.seconds)} s"
    return f"{shown} ±{50 * row.spread:.0f} %" if row.samples > 1 else shown


def as_bar(bar: BarResult) -> str:
    """`✓ 82 % of FMA peak (bar: 75 %)`."""
    mark = {True: "✓", False: "✗", None: "?"}[bar.met]
    sign = "≤" if bar.measure in ("time", "pairs") else "≥"
    what = {
        "peak": "of FMA peak",
        "bandwidth": "of read bandwidth",
        "torch": "torch's speed",
        "time": f"time of {_last(bar.against)}",
        "rate": f"tokens/s of {_last(bar.against)}",
        "pairs": "time that pairs predict",
    }[bar.measure]
    if bar.measure in ("peak", "bandwidth"):
        value = MISSING if bar.value is None else f"{100 * bar.value:.0f} %"
        return f"{mark} {value} {what} (bar {sign} {100 * bar.limit:.0f} %)"
    value = MISSING if bar.value is None else as_ratio(bar.value)
    return f"{mark} {value} {what} (bar {sign} {bar.limit:g}x)"


def _last(name: str) -> str:
    return name.rpartition(" ")[2]


def _table(record: Record) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in COLUMNS[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(COLUMNS[-1])
    for group, rows in groupby(record.rows, key=lambda row: row.group):
        table.add_row(Text(group, style="bold"))
        for row in rows:
            texts: list[Text | str] = [Text(text) for text in cells(row, record)]
            if row.status in ("WRONG", "failed"):
                texts[0] = Text(row.status, style="bold red")
            name = Text(f"  {row.label:12} {title(row)}", style="" if row.ours else "dim")
            table.add_row(name, *texts, _bars(row))
    return table


def _bars(row: Row) -> Text:
    from rich.text import Text

    styles = {True: "green", False: "red", None: "dim"}
    text = Text()
    for index, bar in enumerate(row.bars):
        text.append("\n" if index else "")
        text.append(as_bar(bar), style=styles[bar.met])
    return text
