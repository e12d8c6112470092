"""Parts of stored records as Markdown tables, for the pages under docs/."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables
from benchmarks.gpu_rules import facts_of
from saccade.bench.rule_table import as_table
from saccade.ops.tuning import rules as tuning
from saccade.report import comparison, evaluation
from saccade.report.claims import claims_table
from saccade.report.markdown import escape, evaluation_text, table_text, to_markdown
from saccade.report.numbers import (
    MISSING,
    as_bytes,
    as_position,
    as_ratio,
    as_share,
    significant,
    with_error,
)
from saccade.report.table import Cell, Heading, Line, Table
from scripts import page_whole_model
from scripts.publish_record import RENDER

ROOT = Path(__file__).parents[1]
RULES = ROOT / "saccade/ops/tuning/measured/backends/sm_90.json"
SHOW: dict[str, Callable[[float], str]] = {
    "peak_bytes": as_bytes,
    "cache_bytes": as_bytes,
    "ttft_seconds": lambda value: f"{significant(value)} s",
    "prefill_tps": significant,
    "decode_tps": significant,
    "perplexity": significant,
    "kl": lambda value: with_error(value, None, most_decimals=5),
}
"""How a quantity of a sweep is written."""


def rows(path: Path, *names: str) -> str:
    """Rows of a record whose names begin with one of `names`; of a comparison its references too.

    Names that no row has are left out (`absent` tells which).

    Raises:
        ValueError: no row has any of these names.
    """
    data = json.loads(path.read_text())
    missing = absent(path, *names)
    if len(missing) == len(names):
        known = ", ".join(row["name"] for row in data["rows"])
        raise ValueError(f"{path.name} has no row {missing[0]!r}; it has {known}.")
    if data["schema"] != comparison.SCHEMA:
        chosen = [row for row in data["rows"] if row["name"].startswith(names)]
        return RENDER[data["schema"]](path, data | {"rows": chosen}, "")
    report = comparison.read(path)
    wanted = (*names, report.baseline, *([report.reference] if report.reference else []))
    chosen = [row for row in report.rows if row.name.startswith(wanted)]
    return to_markdown(replace(report, rows=chosen, curves=[], sweep=[], claims=[]))


def absent(path: Path, *names: str) -> list[str]:
    """Those of `names` that no row of a record begins with."""
    known = [row["name"] for row in json.loads(path.read_text())["rows"]]
    return [name for name in names if not any(each.startswith(name) for each in known)]


def sweep(path: Path, quantity: str, *names: str) -> str:
    """One quantity of a comparison's sweep: a row for each configuration, a column a length.

    Names that the sweep does not have are left out.

    Raises:
        ValueError: it has none of them.
    """
    points = comparison.read(path).sweep
    lengths = sorted({point.n_context for point in points})
    known = list(dict.fromkeys(point.name for point in points))
    by_place = {(point.name, point.n_context): point for point in points}
    chosen = [name for name in known if name.startswith(names)]
    if points and not chosen:
        raise ValueError(f"the sweep of {path.name} has no {names[0]!r}, only {', '.join(known)}.")
    if not points:
        return "*This record has no sweep.*"
    lines = [
        Line(name, [_point(by_place.get((name, at)), quantity) for at in lengths])
        for name in chosen
    ]
    title = quantity.removesuffix("_bytes").removesuffix("_seconds").replace("_tps", ", tokens/s")
    return table_text(Table([Heading(as_position(at)) for at in lengths], lines, title))


def _point(point: comparison.SweepPoint | None, quantity: str) -> Cell:
    value = None if point is None else getattr(point, quantity)
    if value is not None:
        return Cell(SHOW[quantity](value))
    return Cell(MISSING if point is None or point.status == "ok" else point.status)


def claims(path: Path) -> str:
    """The chapter's figures, what this record measured, and why they differ."""
    report = comparison.read(path)
    found = claims_table(report) if report.claims else None
    return "*This record has no claims.*" if found is None else table_text(found)


def plan_check(path: Path) -> str:
    """`benchmarks/plan_check.py`: what was planned beside what was measured."""
    shows: dict[str, Callable[[float], str]] = {
        "caches": as_bytes,
        "peak": as_bytes,
        "first_token": lambda value: f"{significant(value)} s",
        "tokens_per_second": significant,
    }
    lines: list[Line] = []
    for row in json.loads(path.read_text())["rows"]:
        cells = [Cell(f"{row['tokens']:,}")]
        if "failed" in row:
            cells += [Cell(MISSING)] * len(shows)
        else:
            for key, show in shows.items():
                planned, real = row["plan"][key], row["measured"][key]
                cells.append(Cell(f"{show(planned)} / {show(real)}", f"{row['off'][key]:+.0%}"))
        lines.append(Line(row["name"], cells))
    titles = ("tokens", "caches", "peak", "first token", "tokens/s")
    corner = "planned / measured (off)"
    return table_text(Table([Heading(title) for title in titles], lines, corner))


def groups(path: Path) -> str:
    """`benchmarks/kv_groups.py`: bytes and KL divergence by format and group size."""
    found = [row for row in json.loads(path.read_text())["rows"] if row.get("hadamard")]
    sizes = sorted({row["group"] for row in found})
    kinds = list(dict.fromkeys(row["format"] for row in found))
    by_place = {(row["format"], row["group"]): row for row in found}
    lines = [Line(str(size), [_group(by_place.get((k, size))) for k in kinds]) for size in sizes]
    return table_text(Table([Heading(kind) for kind in kinds], lines, "tokens a group"))


def _group(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    return Cell(f"{as_bytes(row['bytes'])}, KL {with_error(row['kl'], None, most_decimals=6)}")


def kv_policies(path: Path) -> str:
    """`benchmarks/kv_policies.py`: what each policy keeps of the predictions, by budget."""
    found = json.loads(path.read_text())["rows"]
    budgets = list(dict.fromkeys(row["budget"] for row in found if "budget" in row))
    by_place = {(row["policy"], row.get("budget")): row for row in found}
    lines = [
        Line(
            name, [*(_kept(by_place[name, b]) for b in budgets), _cost(by_place[name, budgets[0]])]
        )
        for name in dict.fromkeys(row["policy"] for row in found if "budget" in row)
    ]
    dense, tokens = found[0], f"{found[0]['tokens']:,} tokens"
    titles = [f"{b:.0%} kept" if isinstance(b, float) else f"{b} keys kept" for b in budgets]
    titles.append("read, compressed")
    answers = f"{dense['needles']}/{dense['asked']} needles with all keys"
    return table_text(Table([Heading(title) for title in titles], lines, f"{tokens}, {answers}"))


def _kept(row: dict[str, Any]) -> Cell:
    kl = with_error(row["kl"], row["kl_se"])
    return Cell(f"KL {kl}, {as_share(row['same_top'])}, {row['needles']}/{row['asked']}")


def _cost(row: dict[str, Any]) -> Cell:
    """Seconds of a processor, to read the context and to compress it to the first budget."""
    return Cell(f"{row['read_seconds']:.1f} s, {row['policy_seconds']:.2f} s")


def kv_decoding(path: Path) -> str:
    """`benchmarks/kv_policies.py`: decoding over compressed caches, in turns with a dense one."""
    found = json.loads(path.read_text())["decode"]
    lines = [
        Line(
            row["cache"],
            [
                Cell(as_bytes(row["bytes"])),
                Cell(f"{significant(row['ms'])} ms"),
                Cell(as_ratio(found[0]["ms"] / row["ms"])),
            ],
        )
        for row in found
    ]
    headings = [Heading("Cache"), Heading("a token"), Heading("speed, dense = 1")]
    return table_text(Table(headings, lines, f"{found[0]['tokens']:,} tokens, 25 % kept"))


def decode_shares(path: Path) -> str:
    """Decoding on a GPU: Gluon's share of reading alone, and its speed beside dense bf16."""
    record = json.loads(path.read_text())
    found = [r for r in record["rows"] if r["case"] == "decode" and "gluon" in r.get("ms", {})]
    dense = {(r["keys"], r.get("batch", 1)): r for r in found if not {"storage", "window"} & set(r)}
    lines: list[Line] = []
    for row in found:
        reading = row["gbytes"] / record["ceilings"]["read_gbs"] / (row["ms"]["gluon"] / 1e3)
        base = dense.get((row["keys"], row.get("batch", 1))) if "storage" in row else None
        ratio = as_ratio(base["ms"]["gluon"] / row["ms"]["gluon"]) if base else MISSING
        lines.append(Line(gpu_tables.title_of(row), [Cell(_percent(reading)), Cell(ratio)]))
    headings = [Heading("of reading alone"), Heading("speed, dense bf16 = 1")]
    return table_text(Table(headings, lines))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 1 else as_share(share)


def rules(path: Path) -> str:
    """Which backend `auto` takes on this GPU: its speed over Triton's and over the fastest other's.

    The range is that of the measured sizes that the rule covers now; a rule that the record does
    not show has no line.
    """
    known = tuning.read(RULES)
    by_rule: dict[int, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        found = next((i for i, rule in enumerate(known) if _measured_for(row, rule)), None)
        if found is not None:
            by_rule.setdefault(found, []).append(row)
    headings = [Heading("backend"), Heading("over Triton"), Heading("over the fastest other")]
    lines = [_rule(by_rule[rule]) for rule in sorted(by_rule)]
    return table_text(Table(headings, lines, "calls from this size on"))


def cpu_rules(path: Path) -> str:
    """Figures behind the rules of a family of CPUs (`saccade bench tune --json`)."""
    return table_text(as_table(json.loads(path.read_text())["rows"]))


def generate(path: Path) -> str:
    """`benchmarks/gpu_generate.py`."""
    return gpu_tables.generate_to_markdown(json.loads(path.read_text()))


def _measured_for(row: dict[str, Any], rule: tuning.Rule) -> bool:
    """Whether a row shows that rule: by what both say, since rules come, go and move."""
    return tuple(row.get("order", ())) == rule.order and rule.fits(facts_of(row))


def _rule(measured: Sequence[dict[str, Any]]) -> Line:
    chosen = measured[0]["order"][0]
    title = gpu_tables.title_of(measured[0])
    title += ", training" if measured[0].get("training") else ""
    triton, other = [], []
    for row in measured:
        times: dict[str, float] = row["total_ms"]
        triton += [times["triton"] / times[chosen]] if "triton" in times else []
        other += [min(t for name, t in times.items() if name != chosen) / times[chosen]]
    return Line(title, [Cell(chosen), Cell(_ratios(triton)), Cell(_ratios(other))])


def _ratios(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return " to ".join(dict.fromkeys(as_ratio(value) for value in (min(values), max(values))))


def far(path: Path) -> str:
    """`benchmarks/far.py`: perplexity inside the trained length and far beyond it."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        by_name.setdefault(row["name"], {})[row["place"]] = row
    lines = [Line(name, [_perplexity(places.get(at)) for at in ("inside", "far")])
             for name, places in by_name.items()]  # fmt: skip
    headings = [Heading("inside the trained length"), Heading("at 3 times that length")]
    return table_text(Table(headings, lines, "perplexity of the last 1k tokens"))


def conversion(path: Path) -> str:
    """`saccade convert --json`: quality of a model before and after its KV heads were merged."""
    lines: list[Line] = []
    for stage, texts in json.loads(path.read_text())["quality"].items():
        for text, found in texts.items():
            kl = with_error(found["kl"], found["kl_se"], most_decimals=2)
            cells = [_perplexity(found), Cell(kl), Cell(as_share(found["same_top"]))]
            lines.append(Line(f"{stage}, {text}", cells))
    titles = ("perplexity", "KL, nats", "same top")
    return table_text(Table([Heading(title) for title in titles], lines, "stage, text"))


def scores(path: Path) -> str:
    """`saccade eval`: the scores of every task at every length."""
    return evaluation_text(evaluation.read(path))


def _perplexity(found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    return Cell(with_error(found["perplexity"], found["perplexity_se"], most_decimals=2))


def source(path: Path) -> str:
    """Where a table comes from: its record, the revision and the command that made it."""
    data = json.loads(path.read_text())
    name = path.relative_to(ROOT)
    made = f"revision {data['revision']}, {data['date'][:10]}, `{data['command']}`"
    return f"<sub>{escape(str(name))}: {made}</sub>"


KINDS: dict[str, Callable[..., str]] = {
    "rows": rows,
    "sweep": sweep,
    "claims": claims,
    "conversion": conversion,
    "scores": scores,
    "far": far,
    "groups": groups,
    "kv_policies": kv_policies,
    "kv_decoding": kv_decoding,
    "plan_check": plan_check,
    "decode_shares": decode_shares,
    "rules": rules,
    "whole_model": page_whole_model.whole_model,
    "whole_model_bars": page_whole_model.bars,
    "whole_model_kl": page_whole_model.divergence,
    "cpu_rules": cpu_rules,
    "generate": generate,
}
