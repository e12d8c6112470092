"""Tables of what `benchmarks.whole_model` measured: whole models against what users have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from saccade.report.markdown import table_text
from saccade.report.numbers import MISSING, as_bytes, as_ratio, as_share, significant, with_error
from saccade.report.table import Cell, Heading, Line, Table

PEER = "llama.cpp"
OURS = "saccade"
LEAST_DECODE = {512: 0.8, 4096: 0.9, 16384: 1.0}
LEAST_PREFILL = {512: 1.0, 4096: 1.5, 16384: 2.0}
MOST_MEMORY, MOST_LOADING, MOST_KL = 1.3, 3.0, 1e-3
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity of a row: how it is taken from a round, and written."""

    title: str
    of: Callable[[Row], float | None]
    show: Callable[[float], str]


def _seconds(value: float) -> str:
    return f"{significant(value)} s"


def _decode(row: Row) -> float:
    return median(row["decode_tps"])


def _prefill(row: Row) -> float:
    return row["context"] / row["first_token_s"]


ONCE = (
    Measure("ready after", lambda row: row["ready_s"], _seconds),
    Measure("loading", lambda row: row["load_s"], _seconds),
    Measure("memory when loaded", lambda row: row["loaded"].get("resident"), as_bytes),
    Measure("peak of loading", lambda row: row["loaded"].get("peak"), as_bytes),
)
FIRST = Measure("first token", lambda row: row["first_token_s"], _seconds)
RATE = Measure("tokens/s", _decode, significant)
MEMORY = Measure("memory", lambda row: row["ended"].get("resident"), as_bytes)


def whole_model(path: Path, model: str) -> str:
    """Loading and memory of one model, then what it does behind prompts of each length.

    A number is the median of all rounds, with the lowest and the highest where they differ; in
    brackets its ratio to llama.cpp, the median of the ratios of rounds that both ran.
    """
    found = [row for row in _record(path)["rows"] if row["model"] == model]
    contexts = sorted({row["context"] for row in found})
    headings = [Heading(each.title) for each in ONCE]
    headings += [Heading(f"{each.title}, {at:,}") for at in contexts for each in (FIRST, RATE)]
    headings.append(Heading(f"{MEMORY.title}, {contexts[-1]:,}"))
    lines: list[Line] = []
    for name in dict.fromkeys(row["name"] for row in found):
        cells = [_cell(found, name, each) for each in ONCE]
        cells += [_cell(found, name, each, at) for at in contexts for each in (FIRST, RATE)]
        cells.append(_cell(found, name, MEMORY, contexts[-1]))
        lines.append(Line(name, cells))
    return table_text(Table(headings, lines, model))


def _cell(rows: list[Row], name: str, measure: Measure, context: int | None = None) -> Cell:
    """The median over rounds; in brackets the ratio to the peer."""
    some = [row for row in rows if row["name"] == name and context in (None, row["context"])]
    failed = [row for row in some if "failed" in row]
    values = sorted(_values(some, measure).values())
    if not values:
        return Cell("failed" if failed else MISSING)
    text = measure.show(median(values))
    low, high = measure.show(values[0]), measure.show(values[-1])
    interval = "" if low == high else f" [{low} to {high}]"
    found = ratio(rows, name, measure, context)
    said = "" if found is None or name == PEER else as_ratio(found)
    return Cell(text + interval, said)


def _values(rows: Iterable[Row], measure: Measure) -> dict[tuple[int, int], float]:
    """(context, round) -> value, of rounds that ran."""
    found = {(row["context"], row["round"]): measure.of(row) for row in rows if "failed" not in row}
    return {at: value for at, value in found.items() if value is not None}


def ratio(rows: list[Row], name: str, measure: Measure, context: int | None) -> float | None:
    """A row over the peer: the median of the rounds that both ran, else of all rounds."""
    mine, theirs = (
        _values((r for r in rows if r["name"] == who and context in (None, r["context"])), measure)
        for who in (name, PEER)
    )
    if not mine or not theirs:
        return None
    both = [mine[at] / theirs[at] for at in mine.keys() & theirs.keys()]
    return median(both) if both else median(mine.values()) / median(theirs.values())


def divergence(path: Path) -> str:
    """How far predictions move from those of float32 weights of the same file."""
    lines = [
        Line(row["name"], [Cell(row["model"]), *_divergence(row)])
        for row in _record(path)["kl"]
    ]  # fmt: skip
    titles = ("model", "KL, nats", "same top")
    return table_text(Table([Heading(title) for title in titles], lines))


def _divergence(row: Row) -> list[Cell]:
    if "kl" not in row:
        return [Cell("failed"), Cell(MISSING)]
    kl = with_error(row["kl"], row["kl_se"], most_decimals=6)
    return [Cell(kl), Cell(as_share(row["same_top"]))]


def bars(path: Path, model: str) -> str:
    """What was aimed at for one model, and whether it was reached."""
    record = _record(path)
    rows = [row for row in record["rows"] if row["model"] == model and "failed" not in row]
    lines = [*_memory_bars(rows, record["models"][model]["bytes"]), *_speed_bars(rows)]
    for row in record["kl"]:
        if row["name"] == OURS and "kl" in row:
            shown = with_error(row["kl"], row["kl_se"], most_decimals=6)
            reached = row["kl"] <= MOST_KL
            lines.append(_bar(f"KL of weights as in the file, {row['model']}", shown,
                              f"≤ {MOST_KL:g}", reached))  # fmt: skip
    headings = [Heading(title) for title in ("measured", "bar", "reached")]
    return table_text(Table(headings, lines, model))


def _memory_bars(rows: list[Row], file: int) -> Iterable[Line]:
    mine = [row for row in rows if row["name"] == OURS and "resident" in row["ended"]]
    if mine:
        needs = median((r["ended"]["resident"] - r["cache_bytes"]) / file for r in mine)
        yield _bar("resident without caches, of the file", as_ratio(needs),
                   f"≤ {MOST_MEMORY}x", needs <= MOST_MEMORY)  # fmt: skip
        own = median(
            (r["ended"]["resident"] - r["cache_bytes"] - r["before"]["resident"]) / file
            for r in mine
        )
        yield _bar("the same without Python and its packages", as_ratio(own),
                   f"≤ {MOST_MEMORY}x", own <= MOST_MEMORY)  # fmt: skip
        pace = median(r["load_s"] for r in mine) / (file / 1e9)
        yield _bar("loading a GB of the file", _seconds(pace), f"≤ {MOST_LOADING:g} s",
                   pace <= MOST_LOADING)  # fmt: skip


def _speed_bars(rows: list[Row]) -> Iterable[Line]:
    prefill = Measure("prefill", _prefill, significant)
    for measure, least in ((RATE, LEAST_DECODE), (prefill, LEAST_PREFILL)):
        what = "decoding" if measure is RATE else "prefill"
        for context in sorted({row["context"] for row in rows} & least.keys()):
            found = ratio(rows, OURS, measure, context)
            if found is not None:
                yield _bar(f"{what} against llama.cpp, {context:,}", as_ratio(found),
                           f"≥ {least[context]}x", found >= least[context])  # fmt: skip


def _bar(what: str, measured: str, bar: str, reached: bool) -> Line:
    return Line(what, [Cell(measured), Cell(bar), Cell("✓" if reached else "✗")])


def peer(path: Path) -> str:
    """The peer and what it was built for."""
    return str(_record(path)["peer"])


def _record(path: Path) -> Any:
    return json.loads(path.read_text())
