"""Packages of others beside our kernels, and the rules that follow for `auto`.

    python -m benchmarks.gpu_peers --out benchmarks/results/h200_peers.json
    python -m benchmarks.gpu_peers --rules benchmarks/results/h200_peers.json

The first measures every backend over a grid of prompts, packed sequences, decoding steps and
gradients; packages that are not installed are left out.  The second prints a rule, as a line of
saccade/ops/tuning/measured/backends/sm_90.json, for each kind of call that a package wins by 3 % or
more from some length on.  They belong at the end of that file: `auto` looks at rules that begin
with a package first, and the page of docs/gpu.md counts the others by their place.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_problems import STEP, Problem
from benchmarks.gpu_rules import PATTERNS, backends_of, measure_rule
from benchmarks.gpu_run import Row
from benchmarks.gpu_run import main as measure_rows
from benchmarks.gpu_tables import TITLES
from saccade.ops.attention.dispatch import PEERS

WHAT = "packages of others beside our kernels, bf16, 32 query and 8 key/value heads; milliseconds"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DIMS = (128, 64, 256, 96, 192)
LEAST = 1.03  # a gain below is within what two measurements of one kernel differ by
HEADS, GROUPS = 32, 4


def rows() -> list[Row]:
    """The whole grid, the most important cases first."""
    return [Row(case_of(p), p, backends_of(p), measure=measured) for p in problems()]


def case_of(problem: Problem) -> str:
    """The table that a problem belongs to."""
    if problem.training:
        return "peers_backward"
    return "peers_decode" if problem.is_step else "peers"


def problems() -> Iterator[Problem]:
    """Prompts, decoding steps, gradients, packed sequences and windows."""
    for dim in DIMS:
        for causal in (True, False):
            for n in LENGTHS:
                yield Problem(queries=n, keys=n, head_dim=dim, causal=causal)
    for dim in DIMS[:2]:
        for batch, keys in ((1, 2048), (1, 8192), (1, 32768), (16, 8192)):
            yield Problem(queries=1, keys=keys, batch=batch, head_dim=dim)
        for n in LENGTHS[1:]:
            for causal in (True, False):
                yield Problem(queries=n, keys=n, head_dim=dim, causal=causal, training=True)
        for count, n in ((64, 512), (16, 2048), (8, 4096)):
            total, each = count * n, (n,) * count
            yield Problem(queries=total, keys=total, head_dim=dim, sequences=each)
        for n in (4096, 16384):
            yield Problem(queries=n, keys=n, head_dim=dim, **PATTERNS["window"])


def measured(problem: Problem, backends: tuple[str, ...], peers: Any) -> dict[str, Any]:
    """A row with `total_ms` and `peer_gain`."""
    return measure_rule(("gluon",), problem, backends, peers)


def proposed(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Rules, one for each kind of call that one package wins from some length on."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["case"].startswith("peers") and row.get("total_ms"):
            kinds.setdefault(_kind(row), []).append(row)
    rules = (_rule(found, source) for found in kinds.values())
    return [rule for rule in rules if rule is not None]


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rules compare besides sizes; `is_step` as in Problem."""
    packed, step = "sequences" in row, row["queries"] <= STEP
    return row["head_dim"], _pattern(row), bool(row.get("training")), packed, step


def _pattern(row: dict[str, Any]) -> str:
    if row.get("window"):
        return "window"
    return "causal" if row.get("causal", True) else "all"


def _rule(found: list[dict[str, Any]], source: str) -> dict[str, Any] | None:
    """The rule of one kind, or None: its longest calls are won by one package, and its gains."""
    found = sorted(found, key=_keys)
    gains = {name: [_gain(row, name) for row in found] for name in PEERS}
    best = max(PEERS, key=lambda name: gains[name][-1])
    won = len(found)
    while won > 0 and gains[best][won - 1] >= LEAST:
        won -= 1
    if won == len(found):
        return None
    dim, pattern, training, packed, step = _kind(found[0])
    fewest = _keys(found[won])
    low, high = min(gains[best][won:]), max(gains[best][won:])
    rule: dict[str, Any] = {"order": [best]} | ({"training": True} if training else {})
    rule |= {"storage": ["packed"]} if packed else {}
    rule |= {"pattern": [pattern], "head_dim": [dim, dim]}
    rule |= {"dtype": ["bfloat16"], "extras": ["none"]}
    rows = HEADS * found[won]["queries"]
    rule |= {"queries": [1, 1] if step else [17, None], "keys": [fewest, None]}
    rule |= {"group_rows": [1, GROUPS]} if step else {"rows": [rows, None]}
    why = f"{TITLES[best]}, {low:.2f} to {high:.2f} times the speed of the fastest other"
    return rule | {"why": why, "source": source}


def _keys(row: dict[str, Any]) -> int:
    """Keys of a row, or of a packed sequence."""
    return row["keys"] // len(row.get("sequences", (0,)))


def _gain(row: dict[str, Any], name: str) -> float:
    """How many times the speed of the fastest other, cuDNN too; 0 where it was not measured."""
    gain: float = row["peer_gain"].get(name, 0.0)
    return gain


def main() -> None:
    """Measure, or print the rules that a record proposes."""
    if sys.argv[1:2] == ["--rules"]:
        path = Path(sys.argv[2])
        for rule in proposed(json.loads(path.read_text()), path.stem):
            print(f"  {json.dumps(rule)},")
        return
    torch.manual_seed(0)
    measure_rows(WHAT, rows())


if __name__ == "__main__":
    main()
