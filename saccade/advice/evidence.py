"""Evidence: how far outputs moved under a setting, as a record measured it.

`evidence.json` is what matters of records in benchmarks/results, which an installed package does
not have.  `python -m scripts.publish_pages` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from saccade.runtime.params import ContextParams

FILE: Final = Path(__file__).with_name("evidence.json")
RECORDS: Final = ("caches-smollm2.json",)
WEIGHTS_RECORDS: Final = "whole-model-*.json"
_WEIGHTS: Final = {
    "saccade": "weights file",
    "saccade, weights int8": "weights int8",
    "saccade, weights int4": "weights int4",
    "saccade, weights bf16": "weights bf16",
}
"""Rows of a whole-model record -> what they say something of."""
_SETTINGS: Final = {
    "bf16 cache": "dense bf16",
    "int8 cache": "int8",
    "int8 keys, int4 values": "int8 keys, int4 values",
    "int4 cache": "int4",
    "SnapKV": "ragged, 25 % kept",
    "window + sinks": "ring 1024 + 4 sinks",
}
"""What a setting is called here -> in the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One measurement of a setting against exact attention.

    Attributes:
        setting: see `setting_of`; options: what was measured, in words.
        kl: KL divergence of the next-token probabilities, nats a token.
        model, tokens: what it was measured on; record, revision: where it is written.
    """

    setting: str
    options: str
    kl: float
    model: str
    tokens: int
    record: str
    revision: str | None

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2g} a token, measured on {self.model} at {self.tokens:,} tokens "
            f"({self.options}; {self.record})"
        )


def setting_of(params: ContextParams) -> str | None:
    """The name under which a setting is measured, None where outputs are exact."""
    if params.kv_policy is not None:
        return "SnapKV"
    if params.n_swa is not None:
        return "window + sinks"
    stored = (params.type_k, params.type_v)
    names: dict[tuple[str | None, str | None], str] = {
        ("bf16", "bf16"): "bf16 cache", ("int8", "int8"): "int8 cache",
        ("int8", "int4"): "int8 keys, int4 values", ("int4", "int4"): "int4 cache",
    }  # fmt: skip
    return names.get(stored, "another setting") if any(stored) else None


def evidence_for(params: ContextParams, tokens: int) -> Evidence | None:
    """The measurement of this setting at the length nearest to `tokens`, None without any."""
    setting = setting_of(params)
    found = [each for each in known() if each.setting == setting]
    return min(found, key=lambda each: abs(each.tokens - tokens)) if found else None


def evidence_for_weights(held: str) -> Evidence | None:
    """The measurement of weights held so ("file", "int8", "int4", "bf16"), None without any."""
    return next((each for each in known() if each.setting == f"weights {held}"), None)


@cache
def known() -> tuple[Evidence, ...]:
    """All measurements."""
    return tuple(Evidence(**each) for each in json.loads(FILE.read_text()))


def distilled(results: Path) -> Iterator[dict[str, Any]]:
    """What `evidence.json` has to hold, from the records in a folder."""
    yield from _of_caches(results)
    yield from _of_weights(results)


def _of_caches(results: Path) -> Iterator[dict[str, Any]]:
    for name in RECORDS:
        record: Any = json.loads((results / name).read_text())
        for row in record["rows"]:
            for setting, called in _SETTINGS.items():
                if row["name"] == called:
                    yield asdict(Evidence(
                        setting=setting, options=called, kl=row["kl"], tokens=row["length"],
                        model=row["where"]["model"].partition(".")[0], record=name,
                        revision=record["revision"],
                    ))  # fmt: skip


def _of_weights(results: Path) -> Iterator[dict[str, Any]]:
    """Of the newest whole-model record: KL from float32 weights of the same file."""
    records: list[tuple[Path, Any]] = [
        (path, json.loads(path.read_text())) for path in results.glob(WEIGHTS_RECORDS)
    ]
    for path, record in sorted(records, key=lambda each: each[1]["date"])[-1:]:
        for row in record["kl"]:
            if row["name"] in _WEIGHTS and "kl" in row:
                yield asdict(Evidence(
                    setting=_WEIGHTS[row["name"]], options=row.get("weights") or row["name"],
                    kl=row["kl"], tokens=row["tokens"], model=row["model"].partition(".")[0],
                    record=path.name, revision=row["revision"],
                ))  # fmt: skip


def write(results: Path) -> None:
    """Write `evidence.json` from the records in a folder."""
    rows = ",\n".join(f" {json.dumps(each)}" for each in distilled(results))
    FILE.write_text(f"[\n{rows}\n]\n")
