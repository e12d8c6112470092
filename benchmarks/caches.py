"""What each cache keeps, how fast it is and what it costs in quality, on the real model.

    python benchmarks/caches.py                          # every length and row; hours on one core
    python benchmarks/caches.py --length 8192 --row int  # parts of names

Rows are added to the record as they finish and never measured twice (`--again` does), so a run
can be stopped and taken up at any time.  The first row of a length is the baseline; the
log-probabilities it gives are kept under out/, because every other row is compared with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade.evals.measure import Trial, fill_divergence, fill_perplexity, measure
from saccade.evals.needle import hide, make_needles, questions
from saccade.evals.rows import RowSpec
from saccade.evals.speed import Rounds, fill_speeds
from saccade.evals.text import default_text
from saccade.hf.model import HFModel
from saccade.ops.attention.cpu import binding
from saccade.report.comparison import Row
from saccade.report.files import write_whole
from saccade.report.markdown import table_text
from saccade.report.numbers import MISSING, as_bytes, as_share, significant, with_error
from saccade.report.record import as_text, origin
from saccade.report.table import Cell, Heading, Line, Table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/caches-smollm2.json"
KEPT = ROOT / "out/caches"
SCHEMA, KILLS_SCHEMA = "saccade.caches/1", "saccade.kills/1"
BASELINE = "dense fp32"
LENGTHS = (2048, 8192, 16384)
SCORED, ANSWER, QUESTION = 256, 32, 32
"""Tokens scored behind the context; written to time decoding; kept free for the question."""

# Adding a row is one line: its name and the options that make it.
ROWS: dict[str, dict[str, Any]] = {
    BASELINE: {"type_k": "f32", "type_v": "f32"},
    "dense bf16": {"type_k": "bf16", "type_v": "bf16"},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int8 keys, int4 values": {"type_k": "int8", "type_v": "int4"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "ring 1024 + 4 sinks": {"n_swa": 1024, "n_sinks": 4},
    "ragged, 25 % kept": {"kv_policy": "ada_snapkv", "kv_budget": 0.25},
}


def spec_of(name: str, length: int, n_ctx_train: int) -> RowSpec:
    """A row at a length; beyond the trained one positions are stretched by YaRN."""
    options = {"n_ctx": length, **ROWS[name]}
    if length > n_ctx_train:
        options |= {"rope_scaling_type": "yarn", "yarn_orig_ctx": n_ctx_train}
    return RowSpec(name=name, group=str(length), params=saccade.ContextParams(**options))


def trial_of(model: Any, runner: HFModel, tokens: list[int], length: int) -> Trial:
    """Context, scored tokens, a question and its answer: `length` tokens in all."""

    def encode(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    def heads(kind: str) -> AbstractContextManager[Any]:
        raise NotImplementedError(f"no row has {kind} heads")

    needles = make_needles(1)
    context = length - SCORED - ANSWER - QUESTION
    rest = context - len(encode(needles[0].sentence))
    return Trial(
        model=runner,
        context=torch.tensor(hide(tokens, needles, encode, context)),
        continuation=torch.tensor(tokens[rest : rest + SCORED]),
        questions=questions(needles, encode),
        heads=heads,
        steps=ANSWER,
    )


def measured(spec: RowSpec, trial: Trial, length: int) -> Row:
    """One row; the baseline's log-probabilities are kept for the others, with what was read."""
    kept, read = KEPT / f"exact-{length}.pt", torch.cat((trial.context, trial.continuation))
    exact: dict[str, Any] = {"read": None}
    if spec.name != BASELINE:
        exact = torch.load(kept, weights_only=True) if kept.exists() else exact
        if exact["read"] is None or not torch.equal(exact["read"], read):
            raise saccade.BadInput(f"measure {BASELINE!r} at {length} first, on the same text.")
    row, rounds = Row(name=spec.name, group=spec.group, options=spec.options()), Rounds()
    seen = measure(spec, trial, row, rounds)
    assert seen is not None and seen.log_probs is not None
    if spec.name == BASELINE:
        exact = {"read": read, "log_probs": seen.log_probs}
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(exact, kept)
    fill_speeds([(row, rounds)], len(trial.context))
    fill_perplexity(row, seen)
    fill_divergence(row, seen, exact["log_probs"])
    return row


def facts(runner: HFModel) -> dict[str, Any]:
    """Of the machine and the model, at the time a row is measured."""
    return {
        "model": runner.facts.name,
        "kernels": "C++" if binding.extension() is not None else "torch",
        **origin(),
    }


def read_record() -> dict[str, Any]:
    """What has been measured so far."""
    if RECORD.exists():
        return json.loads(RECORD.read_text())
    return {"schema": SCHEMA, "scored": SCORED, "answer": ANSWER, "rows": []}


def add(length: int, row: Row, where: dict[str, Any]) -> None:
    """Put a row into the record; of a row measured before, the better speeds stay."""
    record, names, runs = read_record(), list(ROWS), 1
    others = []
    for old in record["rows"]:
        if (old["length"], old["name"]) != (length, row.name):
            others.append(old)
            continue
        runs += old["runs"]
        row.prefill_tps = max(row.prefill_tps or 0, old["prefill_tps"])
        row.decode_tps = max(row.decode_tps or 0, old["decode_tps"])
    entry = {"length": length, **dataclasses.asdict(row), "runs": runs, "where": where}
    rows = sorted([*others, entry], key=lambda r: (r["length"], names.index(r["name"])))
    write_whole(RECORD, as_text({**record, **origin(), "rows": rows}))


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    columns: dict[str, Callable[[Row], str]] = {
        "Cache": lambda r: as_bytes(r.cache_bytes or 0),
        "Prefill, tokens/s": lambda r: significant(r.prefill_tps or 0),
        "Decode, tokens/s": lambda r: significant(r.decode_tps or 0),
        "KL, nats": _kl,
        "Same top": lambda r: as_share(r.same_top or 0),
        "Perplexity": lambda r: with_error(r.perplexity or 0, r.perplexity_se),
    }
    lines: list[Line] = []
    names = {field.name for field in dataclasses.fields(Row)}
    for entry in record["rows"]:
        row = Row(**{k: v for k, v in entry.items() if k in names})
        tokens = f"{entry['length']:,}"
        tokens += " (YaRN)" if row.options.get("rope_scaling_type") == "yarn" else ""
        cells = [Cell(row.name), *(Cell(show(row)) for show in columns.values())]
        lines.append(Line(tokens, cells))
    headings = [Heading("Keys and values", right=False), *map(Heading, columns)]
    return table_text(Table(headings, lines, "Tokens")) + "\n"


def _kl(row: Row) -> str:
    if row.kl is None:
        return MISSING
    return "0" if row.name == BASELINE else with_error(row.kl, row.kl_se, most_decimals=7)


def kills_in_words(kills: dict[str, Any]) -> str:
    """The record of benchmarks/kill_sessions.py as a sentence."""
    moment, byte = kills["kills_at_a_moment"], kills["kills_at_a_byte"]
    writing = kills["of_these_while_writing"] + kills["of_these_while_writing_at_a_byte"]
    return (
        f"{moment + byte:,} processes killed while they read and saved a session of "
        f"{as_bytes(kills['bytes_per_session'])}, {moment:,} at a random moment and {byte:,} at a "
        f"random byte; {writing:,} of them in the middle of writing. "
        f"Sessions lost: {kills['sessions_lost']}.\n"
    )


def _means(word: str, name: str) -> bool:
    """Whether a word of the command line is the name of a row, or a part of it."""
    return word == name or (word not in ROWS and word in name)


def main() -> int:
    """Measure the requested rows that are not yet in the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, action="append", help=f"of {LENGTHS}; default all")
    parser.add_argument(
        "--row", action="append", help="a name in ROWS or a part of one; default all"
    )
    parser.add_argument("--again", action="store_true", help="measure rows anew")
    args = parser.parse_args()
    names = [n for n in ROWS if args.row is None or any(_means(r, n) for r in args.row)]
    model = saccade.load_model("smollm2")
    runner = HFModel(model.model, model.name, model.n_ctx_train)
    tokens = model.tokenizer(default_text()).input_ids
    have = {(r["length"], r["name"]) for r in read_record()["rows"]}
    for length in args.length or LENGTHS:
        for name in names:
            if (length, name) in have and not args.again:
                continue
            spec = spec_of(name, length, model.n_ctx_train)
            row = measured(spec, trial_of(model, runner, tokens, length), length)
            add(length, row, facts(runner))
            print(length, json.dumps(dataclasses.asdict(row)), flush=True)
    print(to_markdown(read_record()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
