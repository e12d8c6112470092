"""The CPU benchmark as text: machine, ceilings, one table, what it adds up to."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from saccade.bench import products
from saccade.bench.peers import PEERS, QUOTED
from saccade.bench.reads import READS, TITLE
from saccade.bench.record import BarResult, Benchmark, Row
from saccade.report.markdown import escape, table_text
from saccade.report.numbers import MISSING, as_duration, as_ratio, as_time, significant
from saccade.report.table import Cell, Heading, Line, Table
from saccade.report.terminal import drawn

if TYPE_CHECKING:
    from rich.console import Console

BASES = {"prefill": "fp32", "decode": "bf16"}  # what the other storage types are compared with
IN_PAIRS = ("bf16", "int8", "int4")  # prefill of these multiplies pairs of bfloat16
COLUMNS = ("time", "rate", "of ceiling", "vs torch", "vs base", "bars")


def print_record(record: Benchmark, console: Console) -> None:
    """Print heading, table and notes."""
    from rich.text import Text

    for line in heading(record):
        console.print(Text(line, style="dim"))
    console.print()
    console.print(drawn(as_table(record)))
    console.print()
    for row in record.rows:
        if row.status != "ok":
            style = "dim" if row.status == "cannot" else "bold red"
            console.print(Text(f"{row.status}  {row.case}, {title(row)}: {row.note}", style=style))
    for line in closing(record):
        console.print(Text(line, style="dim"))


def to_markdown(record: Benchmark) -> str:
    """The same as GitHub-flavoured Markdown; ends with a newline."""
    notes = [
        f"- {row.status}: {row.case}, {title(row)}: {escape(row.note)}"
        for row in record.rows
        if row.status != "ok"
    ]
    above = "  \n".join(map(escape, heading(record)))
    below = "  \n".join(map(escape, closing(record)))
    parts = [above, table_text(as_table(record)), *(["\n".join(notes)] if notes else []), below]
    return "\n\n".join(parts) + "\n"


def as_table(record: Benchmark) -> Table:
    """Cases in groups, each computed by this package and by its peers."""
    lines: list[Line] = []
    for group, rows in groupby(record.rows, key=lambda row: row.group):
        lines.append(Line(group, kind="group"))
        for row in rows:
            texts = [Cell(text) for text in cells(row, record)]
            if row.status in ("WRONG", "failed"):
                texts[0] = Cell(row.status, better=False)
            bars = [Cell(as_bar(bar), better=bar.met) for bar in row.bars]
            name = f"{row.label}, {title(row)}"
            lines.append(Line(name, [*texts, bars], "row" if row.ours else "peer"))
    headings = [Heading(name, right=name != COLUMNS[-1]) for name in COLUMNS]
    return Table(headings, lines)


def heading(record: Benchmark) -> list[str]:
    """Machine and ceilings, as lines."""
    machine, ceilings = record.environment, record.ceilings
    target = f", kernels for {ceilings.target}" if ceilings.target else ""
    threads = f"{ceilings.threads} thread{'s' if ceilings.threads != 1 else ''}"
    peak = ceilings.pair_peak
    pairs = f"products of bf16 {significant(peak / 1e9)} GF/s, " if peak else ""
    return [
        f"{machine.get('cpu')}, {threads}{target}, torch {machine.get('torch')}",
        f"Ceilings: FMA {significant(ceilings.fma_peak / 1e9)} GF/s, {pairs}"
        f"reads {significant(ceilings.read_bandwidth / 1e9)} GB/s, by {ceilings.source}",
    ]


def closing(record: Benchmark) -> list[str]:
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
    """The name of what computed a row."""
    if row.backend == READS:
        return TITLE
    if row.backend == products.PRODUCT:
        return products.TITLE
    return f"saccade {row.backend}" if row.ours else PEERS[row.backend].title


def cells(row: Row, record: Benchmark) -> list[str]:
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
    return [_with_spread(row), *_rates(row, record), faster, against]


def _base(row: Row, record: Benchmark) -> Row | None:
    storage = BASES.get(row.work)
    return record.find(f"{row.group} {storage}", row.backend) if storage and row.ours else None


def _rates(row: Row, record: Benchmark) -> tuple[str, str]:
    """Rate, and the share of whichever ceiling is the nearer one for this case."""
    assert row.seconds is not None and row.flop_rate is not None and row.byte_rate is not None
    in_pairs = row.work == "prefill" and row.storage in IN_PAIRS and record.ceilings.pair_peak > 0
    peak = record.ceilings.pair_peak if in_pairs else record.ceilings.fma_peak
    by_fma = row.flops / peak / row.seconds
    by_reads = row.nbytes / record.ceilings.read_bandwidth / row.seconds
    is_decode = row.work == "decode"
    rate, unit = (row.byte_rate, "GB/s") if is_decode else (row.flop_rate, "GF/s")
    limit = ("bf16 products" if in_pairs else "FMA") if by_fma >= by_reads else "reads"
    return f"{significant(rate / 1e9)} {unit}", f"{100 * max(by_fma, by_reads):.0f} % {limit}"


def _with_spread(row: Row) -> str:
    """`171 ms ±2 %`: the median, and half the distance of the quartiles."""
    assert row.seconds is not None and row.spread is not None
    shown = as_time(row.seconds)
    return f"{shown} ±{50 * row.spread:.0f} %" if row.samples > 1 else shown


def as_bar(bar: BarResult) -> str:
    """`✓ 82 % of FMA peak (bar: 75 %)`."""
    mark = {True: "✓", False: "✗", None: "?"}[bar.met]
    sign = "≤" if bar.measure in ("time", "pairs") else "≥"
    what = {
        "peak": "of FMA peak",
        "bandwidth": "of read bandwidth",
        "torch": "torch's speed",
        "product": "of torch's bf16 matrix product",
        "time": f"time of {_last(bar.against)}",
        "rate": f"{_rate(bar.against)} of {_last(bar.against)}",
        "pairs": "time that pairs predict",
    }[bar.measure]
    if bar.measure in ("peak", "bandwidth", "product"):
        value = MISSING if bar.value is None else f"{100 * bar.value:.0f} %"
        return f"{mark} {value} {what} (bar {sign} {100 * bar.limit:.0f} %)"
    value = MISSING if bar.value is None else as_ratio(bar.value)
    return f"{mark} {value} {what} (bar {sign} {bar.limit:g}x)"


def _rate(against: str) -> str:
    return "tokens/s" if against.startswith("decode") else "speed"


def _last(name: str) -> str:
    return name.rpartition(" ")[2]
