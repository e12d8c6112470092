"""Pictures of the pages under docs/, as SVG: masks, rotary frequencies, bars of a record's rows.

The text of each file depends on saccade's own masks, patterns and rules and on stored records
alone, so a test compares the files with what this draws.  They follow the reader's colour scheme.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saccade.core import DenseKV
from saccade.ops import attention
from saccade.rope import Linear, NTKAware, Rule, Unscaled, YaRN, inverse_frequencies
from saccade.sparse import BlockTopK, Strided
from saccade.units import as_bytes, significant

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.on { fill: #2f6fb3 } .sink { fill: #c2571a } .off { fill: #eaeef2 }
.line { fill: none; stroke: #59636e }
.c0 { stroke: #59636e } .c1 { stroke: #c2571a } .c2 { stroke: #2c8a4b } .c3 { stroke: #2f6fb3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9198a1 }
.on { fill: #6aa5e0 } .sink { fill: #f0883e } .off { fill: #262c36 }
.line { stroke: #9198a1 }
.c0 { stroke: #9198a1 } .c1 { stroke: #f0883e } .c2 { stroke: #56d364 } .c3 { stroke: #6aa5e0 } }
</style>"""


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture of its parts; `title` is what screen readers say."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return "\n".join(
        [f'{head} width="{width}">', f"<title>{escape(title)}</title>", STYLE, *parts, "</svg>\n"]
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    size = f'width="{width:.4g}" height="{height:.4g}"'
    return f'<rect x="{x:.5g}" y="{y:.5g}" {size} class="{kind}"/>'


def mask_picture(title: str, panels: Sequence[tuple[str, torch.Tensor]], first: int = 0) -> str:
    """Which keys each query sees: a row for each query, a column for each key, both from the first.

    Args:
        panels: captions and bool `[queries, keys]`.
        first: columns that are coloured as sinks where later keys are skipped.
    """
    parts: list[str] = []
    for index, (caption, visible) in enumerate(panels):
        left, step = 20 + index * 220, 190 / len(visible)
        parts.append(text(left, 20, caption))
        for q, row in enumerate(visible.tolist()):
            for k, seen in enumerate(row):
                kind = (
                    "off" if not seen else "sink" if k < first and not all(row[k : q + 1]) else "on"
                )
                parts.append(rect(left + k * step, 32 + q * step, step * 0.88, step * 0.88, kind))
    parts.append(
        text(20, 244, "rows: queries, columns: keys; filled: the query reads the key", "small")
    )
    return svg(20 + 220 * len(panels), 256, title, parts)


def windows() -> str:
    """Causal attention, a window of 5, the same with two sinks, as the operator computes them."""
    shapes = {"all earlier keys": {}, "window 5": {"window": 5}}
    shapes["window 5, 2 sinks"] = {"window": 5, "sinks": 2}
    # With equal scores and the identity as values the output is the weight of each key.
    zeros, identity = torch.zeros(1, 1, 16, 16), torch.eye(16)[None, None]
    panels = [
        (name, attention(zeros, zeros, identity, **options)[0, 0] > 0)
        for name, options in shapes.items()
    ]
    return mask_picture("Keys that each query reads under a sliding window", panels, first=2)


def patterns() -> str:
    """Blocks of keys under the two patterns, for random queries and keys with a fixed seed."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 128, 16, generator=random) for _ in range(2))
    k += 0.8 * torch.randn(16, 1, 16, generator=random).repeat_interleave(8, 0).reshape(
        1, 1, 128, 16
    )
    view = DenseKV(k, k)
    strided = Strided(block=8, sink_blocks=1, window_blocks=2, stride=4)
    top = BlockTopK(block=8, top=2, sink_blocks=1, window_blocks=2)
    panels = [
        (name, pattern.select(q, view, 0).allowed[0, 0])
        for name, pattern in (("strided: every 4th block", strided), ("block top-k: 2 best", top))
    ]
    return mask_picture("Blocks of keys that each block of queries reads", panels, first=1)


def frequencies() -> str:
    """By how much each rule slows each pair of a head of 64 channels, for four times the length."""
    rules: dict[str, Rule] = {
        "unscaled": Unscaled(),
        "linear x4": Linear(factor=4.0),
        "NTK x4": NTKAware(factor=4.0),
        "YaRN x4": YaRN(factor=4.0, original_max_position=8192),
    }
    table = partial(inverse_frequencies, base=100_000.0, rotary_dim=64)
    plain = table(Unscaled()).inv_freq
    parts = [text(20, 20, "frequency after scaling / before, by rotary pair")]
    for share, label in ((0.25, "1/4"), (0.5, "1/2"), (1.0, "1")):
        y = 220 - 170 * share
        parts += [
            f'<path d="M60 {y:g}H500" class="line" opacity="0.3"/>',
            text(50, y + 4, label, "small", "end"),
        ]
    for index, (name, rule) in enumerate(rules.items()):
        ratio = (table(rule).inv_freq / plain).tolist()
        points = " ".join(
            f"{60 + 440 * i / 31:.5g},{220 - 170 * r:.5g}" for i, r in enumerate(ratio)
        )
        parts.append(f'<polyline points="{points}" class="line c{index}" stroke-width="2.5"/>')
        y = 50 + 20 * index
        parts += [
            f'<path d="M520 {y}H545" class="line c{index}" stroke-width="2.5"/>',
            text(552, y + 4, name),
        ]
    parts += [text(60, 240, "fast pairs (position by position)", "small")]
    parts += [text(500, 240, "slow pairs (far distances)", "small", "end")]
    return svg(660, 252, "How rotary frequencies change under each scaling rule", parts)


class Panel(NamedTuple):
    """One quantity of rows: the field, its heading, and how a value is written."""

    field: str
    title: str
    show: Callable[[float], str]


COST = (
    Panel("peak_bytes", "peak memory", as_bytes),
    Panel("cache_bytes", "cache", as_bytes),
    Panel("prefill_tps", "prefill, tokens/s", significant),
    Panel("decode_tps", "decode, tokens/s", significant),
)
LOSS = (
    Panel("cache_bytes", "cache", as_bytes),
    Panel("kl", "KL divergence, nats", partial(significant, digits=2)),
    Panel("decode_tps", "decode, tokens/s", significant),
)


def bars(
    record: str, names: Sequence[str], panels: Sequence[Panel], length: int | None = None
) -> str:
    """Rows whose names begin with one of `names`, a column of bars for each quantity."""
    data = json.loads((RESULTS / record).read_text())
    always = (data.get("baseline") or "-", data.get("reference") or "-")
    rows = [
        row
        for row in data["rows"]
        if row["name"].startswith((*names, *always)) and row.get("length") == length
    ]
    parts: list[str] = []
    for y, row in zip(range(48, 10_000, 26), rows, strict=False):
        parts.append(text(10, y + 13, row["name"]))
        for x, panel in zip(range(200, 10_000, 165), panels, strict=False):
            parts += _bar(x, y, row, panel, max(r[panel.field] or 0 for r in rows))
    parts += [text(200 + 165 * i, 30, panel.title) for i, panel in enumerate(panels)]
    height = 56 + 26 * len(rows)
    return svg(
        200 + 165 * len(panels), height, f"Measured: {', '.join(r['name'] for r in rows)}", parts
    )


def _bar(x: int, y: int, row: dict[str, Any], panel: Panel, most: float) -> list[str]:
    value = row[panel.field]
    if value is None:
        return [text(x, y + 13, "–", "small")]
    width = 80 * value / most if most else 0
    return [
        rect(x, y, max(width, 1), 18, "on"),
        text(x + width + 5, y + 13, panel.show(value), "small"),
    ]


def densities(record: str, length: int) -> str:
    """Same top by the share of pairs that is read: a line for each kind of pattern."""
    rows = [r for r in json.loads((RESULTS / record).read_text())["rows"] if r["length"] == length]
    least = min(row["same_top"] for row in rows)
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["density"]):
        name = row["name"].partition("(")[0] + (" 8" if "stride=8," in row["name"] else "")
        y = 300 - 270 * (row["same_top"] - least) / (1 - least)
        kinds.setdefault(name, []).append((60 + 440 * row["density"], y))
    parts = [text(20, 16, "predictions that stay the same, by the share of pairs that is read")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = 60 + 440 * share, 300 - 270 * share
        parts += [
            f'<path d="M60 {y:g}H500M{x:g} 30V300" class="line" opacity="0.3"/>',
            text(x, 318, f"{share:.0%}", "small", "middle"),
            text(54, y + 4, f"{least + share * (1 - least):.1%}", "small", "end"),
        ]
    for index, (name, points) in enumerate(kinds.items()):
        kind, y = f"line c{index % 4}", 40 + 20 * index
        dashes = ' stroke-dasharray="5 4"' if index > 3 else ""
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="{kind}" stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{x:.4g}" cy="{y:.4g}" r="4" class="{kind}"/>' for x, y in points]
        parts.append(f'<path d="M520 {y}H545" class="{kind}" stroke-width="2"{dashes}/>')
        parts.append(text(552, y + 4, name))
    return svg(680, 330, "Predictions that stay the same under each sparse pattern", parts)


DEMO = "compare-smollm2-quick.json"
PICTURES: dict[str, Callable[[], str]] = {
    "flash-attention.svg": partial(bars, DEMO, ["flash attention"], COST),
    "sliding-window.svg": windows,
    "sparse.svg": patterns,
    "sparse-density.svg": partial(densities, "sparse_quality.json", 8192),
    "yarn.svg": frequencies,
    "compression.svg": partial(bars, DEMO, ["tokens kept", "SnapKV"], LOSS),
    "quantized-kv.svg": partial(bars, "caches-smollm2.json", ["dense", "int"], LOSS, length=8192),
}
