"""Which backend is fastest for which call: the figures behind the rules that `auto` follows.

    python -m benchmarks.gpu_rules --out benchmarks/results/h200_rules.json

Every rule of saccade/ops/tuning/measured/backends is measured at the smallest sizes that it
covers and at typical ones: the backends of its order and all others that can run the call.  A row
says whether its rule holds: `gain` is the time of the fastest other backend over that of the rule's
first one; packages of others, which few machines have, count only for their own rules, and
`peer_gain` is what each of them would win (benchmarks/gpu_peers.py proposes their rules).  cuDNN
makes a plan for every new shape; what that costs the host is a row of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measure import measure, measure_plan
from benchmarks.gpu_problems import STEP, Problem
from benchmarks.gpu_run import Row, main
from saccade.bench.inputs import KINDS
from saccade.ops.attention.dispatch import PEERS
from saccade.ops.tuning.rules import Facts

WHAT = "every rule of `auto`: milliseconds of each backend at its smallest and at typical sizes"
RULES = Path(__file__).parents[1] / "saccade/ops/tuning/measured/backends"
OURS = ("gluon", "triton")
HEADS, KV_HEADS, LONGEST = 32, 8, 32768
SIZES = ("smallest", "typical")
PATTERNS = {"causal": {}, "all": {"causal": False}, "window": {"window": 1024}}


def rules(name: str = "sm_90") -> list[dict[str, Any]]:
    """The rules of an architecture as they stand in the file."""
    return json.loads((RULES / f"{name}.json").read_text())["rules"]


def rule_rows() -> Iterator[Row]:
    """Two sizes of each rule, for the head dimensions, patterns and storage that it names."""
    for at, rule in enumerate(rules(), 1):
        kinds, patterns = rule.get("storage", ["dense"]), rule.get("pattern", list(PATTERNS))
        for dim, pattern, kind in product(dims_of(rule), patterns, kinds):
            for size in SIZES:
                problem = problem_of(rule, dim, pattern, kind, size)
                how = partial(measure_rule, rule["order"])
                notes = (("rule", at), ("size", size))
                yield Row("rule", problem, backends_of(problem), (), notes, how)


def backends_of(problem: Problem) -> tuple[str, ...]:
    """Backends that could run it: PyTorch's fused kernels have no windows, pages or sequences."""
    training = ("gluon_triton",) if problem.training else ()
    stored = problem.storage != "dense"
    special = problem.window or problem.sequences or problem.kv_lens or stored
    return (*OURS, *training, *(() if special else ("sdpa",)), *PEERS)


def dims_of(rule: dict[str, Any]) -> list[int]:
    """The smallest head dimension of a rule, and the largest multiple of 16 where they differ."""
    low, high = rule.get("head_dim", [64, 256])
    return list(dict.fromkeys((low, high // 16 * 16)))


def least(rule: dict[str, Any], name: str) -> int:
    """The smallest number of a condition, 1 where it has none."""
    return rule.get(name, [None, None])[0] or 1


def is_decoding(rule: dict[str, Any]) -> bool:
    """Whether a rule is about few queries over a cache."""
    most = rule.get("queries", [None, None])[1]
    return most is not None and most <= STEP


def problem_of(rule: dict[str, Any], dim: int, pattern: str, kind: str, size: str) -> Problem:
    """The smallest problem that a rule covers, or one of a usual size."""
    options: dict[str, Any] = {"head_dim": dim, "training": rule.get("training", False)}
    options |= PATTERNS[pattern] | {"pages": {"storage": "page16"}}.get(kind, {})
    if is_decoding(rule):
        return _decoding(rule, kind, size, options)
    keys, rows = max(least(rule, "keys"), 512), least(rule, "rows")
    if kind == "packed":
        return _packed(dim, keys, rows, size)
    if kind in ("ring", "quantized"):
        queries = -(-rows // HEADS) if size == "smallest" else 2048
        storage = {"storage": kind if kind == "ring" else "int8"}
        window = {"window": 4096, "sinks": 4} if kind == "ring" else {}
        keys = keys if size == "smallest" else 32768
        return Problem(queries=queries, keys=keys, **options | storage | window)
    fewest, most = least(rule, "queries"), rule.get("queries", [None, None])[1] or 2048
    queries = min(keys, -(-rows // HEADS))
    square = queries == keys or rule.get("square", False) or rule.get("training", False)
    batch = -(-rows // (HEADS * queries))
    if size == "typical":
        keys, batch = min(LONGEST, max(8192, 4 * keys)), batch if kind == "kv_lens" else 1
        queries = keys if square else min(2048, most)
    queries = keys if square else queries
    if kind == "kv_lens":
        batch = max(2, batch)
        smallest = max(fewest, -(-rows // (HEADS * batch)))
        queries = smallest if size == "smallest" else min(2048, most)
        options["kv_lens"] = uneven(keys, batch)
    return Problem(queries=queries, keys=keys, batch=batch, **options)


def facts_of(row: dict[str, Any]) -> Facts:
    """What rules compare of a row of the record."""
    names = {field.name for field in fields(Problem)}
    problem = Problem(**{name: value for name, value in row.items() if name in names})
    pages, quantized = problem.storage.startswith("page"), problem.storage in KINDS
    storage = "pages" if pages else "quantized" if quantized else problem.storage
    storage = "packed" if problem.sequences else "kv_lens" if problem.kv_lens else storage
    narrow = problem.window is not None and problem.window < problem.keys
    return Facts(
        head_dim=problem.head_dim,
        pattern="window" if narrow else "causal" if problem.causal else "all",
        training=problem.training,
        storage=storage,
        queries=problem.queries,
        keys=problem.keys // max(1, len(problem.sequences)),
        rows=problem.batch * problem.heads * problem.queries,
        group_rows=problem.groups * problem.queries,
    )


def uneven(keys: int, batch: int) -> tuple[int, ...]:
    """Lengths of the rows of a batch, from all keys down to about half of them."""
    return tuple(keys - i * keys // (2 * batch) for i in range(batch))


def _decoding(rule: dict[str, Any], kind: str, size: str, options: dict[str, Any]) -> Problem:
    """One token over the fewest keys, or as many as the rule allows over a long cache."""
    most = rule["group_rows"][1] * KV_HEADS // HEADS
    keys, queries, batch = max(least(rule, "keys"), 64), 1, 1
    if size == "typical":
        keys, queries = 32768, max(1, min(most, rule["queries"][1]))
    if kind == "quantized":
        keys = max(keys, 1024)
        options["storage"] = "int8"
    if kind == "kv_lens":
        batch = 4
        options["kv_lens"] = uneven(keys, batch)
    return Problem(queries=queries, keys=keys, batch=batch, **options)


def _packed(dim: int, keys: int, rows: int, size: str) -> Problem:
    """Sequences of the smallest average length, or eight of 4096."""
    total = -(-rows // HEADS)
    lengths = (keys,) * -(-total // keys) if size == "smallest" else (4096,) * 8
    return Problem(queries=sum(lengths), keys=sum(lengths), head_dim=dim, sequences=lengths)


def measure_rule(
    order: Sequence[str], problem: Problem, backends: Sequence[str], peers: Sequence[str]
) -> dict[str, Any]:
    """A row of `measure` with `total_ms` (where a call trains with the forward pass), `gain`
    and `peer_gain`.

    `gain` is None where the first of the order, or every other backend, could not be timed.
    """
    row = measure(problem, backends, peers)
    forward = row.get("forward_ms", {})
    total = {name: ms + forward.get(name, 0.0) for name, ms in row["ms"].items()}
    ours = {name: ms for name, ms in total.items() if name not in PEERS}
    others = [ms for name, ms in ours.items() if name != order[0]]
    gain = min(others) / total[order[0]] if order[0] in total and others else None
    peers = {name: min(ours.values()) / total[name] for name in PEERS if name in total and ours}
    return row | {"order": list(order), "total_ms": total, "gain": gain, "peer_gain": peers}


def chunk_rows() -> Iterator[Row]:
    """Chunks of a prompt over rings and quantized caches."""
    for dim in (128, 64, 256):
        for queries in (256, 2048):
            ring = Problem(
                queries=queries, keys=16384, head_dim=dim, window=4096, sinks=4, storage="ring"
            )
            yield Row("chunk", ring, OURS)
            for kind in ("int8", "int4"):
                quantized = Problem(queries=queries, keys=16384, head_dim=dim, storage=kind)
                yield Row("chunk", quantized, OURS)


def plan_rows() -> Iterator[Row]:
    """What a new shape costs with cuDNN, for the head dimensions of its rules."""
    for dim, causal, training in (
        (128, True, False), (96, True, True), (192, True, True), (128, True, True),
    ):  # fmt: skip
        problem = Problem(queries=1000, keys=1000, head_dim=dim, causal=causal, training=training)
        yield Row("plan", problem, measure=measure_plan)


def half_rows() -> Iterator[Row]:
    """float16 beside the bfloat16 of everything else."""
    for dim in (64, 128, 256):
        problem = Problem(queries=8192, keys=8192, head_dim=dim, dtype="fp16")
        yield Row("fp16", problem, backends_of(problem))


def score_rows() -> Iterator[Row]:
    """Softcap and ALiBi, which no rule tells apart from plain scores, beside those."""
    scores: tuple[dict[str, Any], ...] = ({}, {"softcap": 50.0}, {"alibi": True})
    for dim, causal, way in product((128, 64, 256), (True, False), scores):
        problem = Problem(queries=8192, keys=8192, head_dim=dim, causal=causal, **way)
        yield Row("scores", problem, OURS)
    for queries, way in product((64, 1024), scores):
        yield Row("scores", Problem(queries=queries, keys=32768, **way), OURS)
    for way in scores:
        problem = Problem(queries=4096, keys=4096, training=True, **way)
        yield Row("scores", problem, ("gluon", "gluon_triton", "triton"))


def rows() -> list[Row]:
    """Rules first; a problem that several rules cover is measured once for each."""
    return [*rule_rows(), *chunk_rows(), *plan_rows(), *half_rows(), *score_rows()]


if __name__ == "__main__":
    torch.manual_seed(0)
    main(WHAT, rows())
