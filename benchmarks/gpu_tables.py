"""Records of `benchmarks.gpu_run` as Markdown: TFLOP/s, or microseconds of a decoding step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saccade.report.markdown import table_text
from saccade.report.numbers import MISSING, significant
from saccade.report.table import Cell, Heading, Line, Table

TITLES = {
    "gluon": "Gluon", "gluon_fp8": "Gluon fp8", "triton": "Triton", "gluon_triton": "Gluon, Triton",
    "fa3": "FlashAttention-3", "fa4": "FlashAttention-4", "flash_attn": "flash-attn",
    "flashinfer": "FlashInfer", "cudnn": "cuDNN", "flash2": "FlashAttention-2",
    "flex": "FlexAttention", "sdpa": "SDPA",
    "sdpa_rows": "SDPA", "products": "products and softmax",
}  # fmt: skip
STEPS = ("decode", "peers_decode", "mla_decode")  # cases that are bound by memory


def to_markdown(record: dict[str, Any], case: str) -> str:
    """The rows of one case; ends with a newline."""
    rows = [row for row in record["rows"] if row["case"] == case and row.get("ms")]
    backends = [name for name in TITLES if any(name in row["ms"] for row in rows)]
    show: Callable[[dict[str, Any], str], str] = _microseconds if case in STEPS else _tflops
    lines = [Line(title_of(row), [Cell(show(row, name)) for name in backends]) for row in rows]
    headings = [Heading(TITLES[name]) for name in backends]
    if case in STEPS and record["ceilings"]:
        headings.append(Heading("reading alone"))
        rate = record["ceilings"]["read_gbs"]
        lines = [
            Line(line.name, [*line.cells, Cell(significant(1e6 * row["gbytes"] / rate))])
            for line, row in zip(lines, rows, strict=True)
        ]
    return table_text(Table(headings, lines, "µs" if case in STEPS else "TFLOP/s")) + "\n"


def model_to_markdown(record: dict[str, Any]) -> str:
    """A model end to end: a row for each length, ours and SDPA's; ends with a newline."""
    headings = [Heading(name) for name in ("first token, s", "peak, GiB", "ms a token")]
    lines: list[Line] = []
    for key, title in (("ours", "saccade"), ("sdpa", "SDPA"), ("compiled", "compiled SDPA")):
        part = record.get(key, {})
        for length, row in part.get("decode", part).items():
            if length.isdigit() and "ms_per_token" in row:
                name = f"{title}, {_tokens(int(length))}"
                lines.append(Line(name, _figures(row)))
        for kind in ("int8", "fp8", "int4"):
            if kind in part:
                lines.append(Line(f"{title}, {kind} cache, longest", _figures(part[kind])))
    return table_text(Table(headings, lines)) + "\n"


def generate_to_markdown(record: dict[str, Any]) -> str:
    """`generate()`: milliseconds of a token and of the first one; ends with a newline."""
    cases = {name: found for name, found in record.items() if name.startswith("batch ")}
    rows = list(dict.fromkeys(row for found in cases.values() for row in found))
    headings = [Heading(name) for name in cases]
    lines = [
        Line(row, [Cell(_token_and_first(found.get(row))) for found in cases.values()])
        for row in rows
    ]
    return table_text(Table(headings, lines, "ms a token (of the first)")) + "\n"


def _token_and_first(row: dict[str, float] | None) -> str:
    if row is None:
        return MISSING
    return f"{significant(row['token_ms'])} ({significant(row['first_ms'])})"


def _figures(row: dict[str, Any]) -> list[Cell]:
    names = ("first_token_s", "prefill_peak_gib", "ms_per_token")
    return [Cell(significant(row[name]) if name in row else MISSING) for name in names]


def title_of(row: dict[str, Any]) -> str:
    """A problem in a few words: `D 128, causal, 16k`."""
    parts = [f"{row['heads']} heads"] if row["case"] == "mla_decode" else [f"D {row['head_dim']}"]
    if "sequences" in row:
        parts.append(f"{len(row['sequences'])} sequences of {_tokens(row['sequences'][0])}")
    elif row["queries"] == row["keys"]:
        parts += ["all keys" if row.get("causal") is False else "causal", _tokens(row["keys"])]
    elif row["queries"] == 1:
        parts.append(f"{_tokens(row['keys'])} keys")
    else:
        parts.append(f"{_tokens(row['queries'])} queries, {_tokens(row['keys'])} keys")
    parts += [f"batch {row['batch']}"] if row.get("batch", 1) > 1 else []
    parts += [f"window {row['window']}"] if row.get("window") else []
    parts += [f"{row['density']:.0%} of the blocks"] if row.get("density") else []
    return ", ".join([*parts, *([row["storage"]] if "storage" in row else [])])


def _tokens(count: int) -> str:
    return f"{round(count / 1024)}k" if count >= 1024 else str(count)


def _tflops(row: dict[str, Any], name: str) -> str:
    return f"{1e3 * row['tflop'] / row['ms'][name]:.0f}" if name in row["ms"] else MISSING


def _microseconds(row: dict[str, Any], name: str) -> str:
    return significant(1e3 * row["ms"][name]) if name in row["ms"] else MISSING
