"""Answers in the layout of kvpress' leaderboard, so that they can stand beside its own.

One folder for each length and set of options, named as `evaluation/evaluate.py` of
github.com/NVIDIA/kvpress does: `ruler__4096__MODEL__snapkv__0.50`, with `__query_aware` at the end
where the question was read before compression.  In it are `config.yaml`, `metrics.json` and
`predictions.csv`, with its fields.  Tasks that are not RULER's are in folders of `saccade`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from saccade.report.evaluation import Evaluation, Score
from saccade.report.files import write_whole

PRESSES = {"ada_snapkv": "adakv_snapkv"}
"""Policies that kvpress calls otherwise."""
RULER = ("niah_", "vt", "cwe", "fwe")
FIELDS = (
    "question",
    "answer_prefix",
    "answer",
    "task",
    "max_new_tokens",
    "predicted_answer",
    "compression_ratio",
)


class Asked(Protocol):
    """A question; see `saccade.evals.tasks.Turn`."""

    @property
    def question(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def n_predict(self) -> int: ...


class At(Protocol):
    """Where an answer belongs; see `saccade.evals.kept.Place`."""

    @property
    def row(self) -> str: ...
    @property
    def asked(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One answer: what was asked where, and what the model wrote."""

    place: At
    turn: Asked
    text: str


class _Group(NamedTuple):
    """What one folder holds."""

    dataset: str
    context: int
    row: str
    asked: str


def export(report: Evaluation, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """Write a folder for each length and set of options; a name that exists gets one inside.

    Results that are gated, stopped or failed are left out.

    Returns:
        The folders.
    """
    groups: dict[_Group, list[Score]] = {}
    for result in report.results:
        if result.status == "ok":
            key = _Group(_dataset(result.task), result.context, result.row, result.asked)
            groups.setdefault(key, []).append(result)
    return [
        _write(report, group, results, predictions, folder) for group, results in groups.items()
    ]


def _dataset(task: str) -> str:
    return "ruler" if task.startswith(RULER) else "saccade"


def _write(
    report: Evaluation,
    group: _Group,
    results: Sequence[Score],
    predictions: Sequence[Prediction],
    folder: Path,
) -> Path:
    options = report.settings["rows"][group.row]
    config = _config(report, group, results, options)
    made = _new_folder(folder / _name(config))
    tasks = {result.task for result in results}
    rows = [
        each for each in predictions
        if each.place.task in tasks
        and (each.place.context, each.place.row, each.place.asked) == group[1:]
    ]  # fmt: skip
    metrics = {r.task: {"string_match": round(100 * (r.mean or 0.0), 2)} for r in results}
    # JSON is YAML, so each value of the config is written as JSON.
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in config.items()]
    write_whole(made / "config.yaml", "".join(lines))
    write_whole(made / "metrics.json", json.dumps(metrics, indent=4))
    write_whole(made / "predictions.csv", _csv(rows, config["compression_ratio"]))
    return made


def _config(
    report: Evaluation, group: _Group, results: Sequence[Score], options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "dataset": group.dataset,
        "data_dir": str(group.context),
        "model": report.model["name"],
        "device": report.settings["device"],
        "press_name": _press(options),
        "compression_ratio": round(1.0 - _kept(report, results, options), 4),
        "fraction": 1.0,
        "query_aware": group.asked == "before",
        "seed": report.settings["seed"],
        "press_init_command": f"saccade: {group.row}",
    }


def _press(options: Mapping[str, Any]) -> str:
    """kvpress' name of a policy; what it has no name for is joined by a hyphen."""
    policy: str = options.get("kv_policy", "no_press")
    types: list[str] = [options[name] for name in ("type_k", "type_v") if name in options]
    pattern = [options["sparse"].partition("(")[0].lower()] if "sparse" in options else []
    return "-".join([PRESSES.get(policy, policy), *dict.fromkeys(types), *pattern])


def _kept(report: Evaluation, results: Sequence[Score], options: Mapping[str, Any]) -> float:
    """The share of keys that stay: the budget, of tokens or bytes the measured share of bytes."""
    budget = options.get("kv_budget", 1.0)
    if isinstance(budget, float):
        return budget
    whole = [(r.cache_bytes, report.dense(r.task, r.context)) for r in results]
    shares = [size / d.cache_bytes for size, d in whole if size and d and d.cache_bytes]
    return min(1.0, fmean(shares)) if shares else 1.0


def _name(config: Mapping[str, Any]) -> str:
    parts = [
        config["dataset"],
        config["data_dir"],
        config["model"].replace("/", "--"),
        config["press_name"],
        f"{config['compression_ratio']:.2f}",
        *(["query_aware"] if config["query_aware"] else []),
    ]
    return "__".join(parts)


def _new_folder(path: Path) -> Path:
    """That folder; where it exists, a numbered one in it, as kvpress does."""
    made, number = path, 0
    while made.exists():
        number += 1
        made = path / str(number)
    made.mkdir(parents=True)
    return made


def _csv(rows: Sequence[Prediction], ratio: float) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for each in rows:
        turn = each.turn
        writer.writerow(
            [turn.question, turn.prefix, list(turn.answers), each.place.task, turn.n_predict,
             each.text, ratio]
        )  # fmt: skip
    return out.getvalue()
