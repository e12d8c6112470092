"""The command line and the record of every benchmark that is a list of attention problems.

--out FILE      the record, written anew after every row
--seconds N     start no row after that time
--resume FILE   keep the rows of a record that stopped for want of time, and measure the rest: those
                behind them, and those that are null
--only WORD     rows whose case is one of these
--warm I N      compile what every N-th row from the I-th on runs, and time nothing
--tiny          small problems on a CPU, to try the script
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measure import measure, warm
from benchmarks.gpu_problems import Problem
from saccade.bench.gpu import ceilings, on_gpu
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin

SCHEMA = "saccade.gpu/1"
Measure = Callable[[Problem, Sequence[str], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a record measures.

    Attributes:
        case: the table it belongs to; backends: of saccade; peers: of PyTorch; notes: fields that
            the record keeps as they are.
    """

    case: str
    problem: Problem
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    notes: tuple[tuple[str, Any], ...] = ()
    measure: Measure = measure


def main(what: str, rows: Sequence[Row], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the rows that the command line selects, print each, and write the record."""
    args = _arguments(what, argv)
    chosen = [row for row in rows if not args.only or row.case in args.only]
    if args.warm:
        _warm(chosen[args.warm[0] :: args.warm[1]], args.seconds)
        return {}
    if not (args.tiny or on_gpu()):
        sys.exit("There is no GPU here; --tiny tries the script on the CPU.")
    record: dict[str, Any] = {
        "schema": SCHEMA, **origin(), "what": what, "complete": False,
        "ceilings": {} if args.tiny else ceilings(), "rows": [],
    }  # fmt: skip
    if args.resume:
        record |= _resumed(args.resume, what)
    begin = time.perf_counter()
    found = record["rows"]
    for at, row in enumerate(chosen):
        if at < len(found) and found[at] is not None:
            continue
        if time.perf_counter() - begin > args.seconds:
            break
        measured = _measured(row, args.tiny)
        if at < len(found):
            found[at] = measured
        else:
            found.append(measured)
        record["complete"] = len(found) == len(chosen) and None not in found
        print(measured, flush=True)
        if args.out:
            write_whole(args.out, as_text(record))
    return record


def _resumed(path: Path, what: str) -> dict[str, Any]:
    """What a record keeps of the one that it goes on with: its rows, and whose they are."""
    begun = json.loads(path.read_text())
    if begun.get("what") != what:
        sys.exit(f"{path} is no record of this benchmark; --resume takes one that it began.")
    kept = sum(row is not None for row in begun["rows"])
    of = {name: begun[name] for name in ("revision", "date")} | {"rows": kept}
    return {"rows": begun["rows"], "resumed": [*begun.get("resumed", []), of]}


def _arguments(what: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=what, epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--warm", nargs=2, type=int)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(argv)


def _measured(row: Row, tiny: bool) -> dict[str, Any]:
    """A row with its case; one that fails must not cost the others."""
    problem = row.problem.tiny() if tiny else row.problem
    backends = (*row.backends, "tiled") if tiny else row.backends
    start = {"case": row.case, **dict(row.notes)}
    try:
        return start | row.measure(problem, backends, row.peers)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return start | problem.facts() | {"failed": {"row": text}}
    finally:
        if on_gpu():
            torch.cuda.empty_cache()


def _warm(rows: Sequence[Row], limit: float) -> None:
    begin = time.perf_counter()
    for row in rows:
        if time.perf_counter() - begin > limit:
            return
        try:
            warm(row.problem if on_gpu() else row.problem.tiny(), row.backends)
        except Exception as error:
            print(row.case, row.problem.facts(), type(error).__name__, str(error)[:200], flush=True)
        if on_gpu():
            torch.cuda.empty_cache()
