"""`saccade compare` on one GPU: a real model, and Llama-3.1-8B's shape with random weights.

    python -m benchmarks.gpu_compare --model smollm2 --out benchmarks/results --seconds 520

Each part is a process of its own with its own share of the time, so that one that fails costs
nothing else; each writes a record that `saccade report` reads.  Random weights say nothing about
quality: these columns stay empty there, and the record says why.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.gpu_models import DEVICE, LONG, SHAPE, TINY, random_model, tokens
from saccade.evals.compare import Progress, run
from saccade.hf.load import LoadedModel, load_model
from saccade.report.comparison import Report, SweepPoint
from saccade.report.record import origin

NAME = "Llama-3.1-8B's shape, random weights"
NO_QUALITY = "the weights are random: nothing is said about quality"
START_SECONDS = 40
"""Imports, loading and compiling before the first row may begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One record.

    Attributes:
        file: its name; seconds: its share of the time.
        context: tokens of the table; sweep: lengths of the sweep.
        real: the model of --model, else random weights.
        rows: names of rows, None for all of a quick or a full run.
    """

    file: str
    seconds: float
    context: int
    sweep: tuple[int, ...] = ()
    real: bool = False
    rows: tuple[str, ...] | None = None


PARTS = {
    "smollm2": Part(file="compare-h200-smollm2.json", seconds=270, context=4096, real=True,
                    sweep=(1024, 4096, 16384, 65536)),
    "8b-8k": Part(file="compare-h200-8b-8k.json", seconds=110, context=8192),
    "8b-32k": Part(file="compare-h200-8b-32k.json", seconds=240, context=32768),
    "8b-sweep": Part(file="compare-h200-8b-sweep.json", seconds=130, context=1024,
                     rows=("flash",), sweep=(4096, 16384, 65536, LONG - 1024)),
}  # fmt: skip
BATCH = 4096


def report_of(part: Part, model: str, seconds: float, *, tiny: bool) -> Report:
    """Measure one part in this process."""

    def show(state: Progress) -> None:
        print(f"[{state.done}/{state.total}] {state.label}", file=sys.stderr, flush=True)

    rows = None if part.rows is None else list(part.rows)
    context, sweep = _sizes(part, tiny)
    if part.real:
        loaded = load_model(model, device=DEVICE)
        return run(loaded, context=context, sweep=sweep, rows=rows, seconds=seconds,
                   quick=tiny, on_progress=show)  # fmt: skip
    config = LlamaConfig(**{**SHAPE, **(TINY if tiny else {})})
    shape = LoadedModel(model=random_model(config, "sdpa"), tokenizer=None, name=NAME,
                        n_ctx_train=LONG)  # fmt: skip
    ids = tokens(max(context, *sweep, 0) + 1024, config.vocab_size).tolist()
    report = run(shape, tokens=ids, context=context, sweep=sweep, rows=rows, quick=True,
                 scored=False, n_batch=128 if tiny else BATCH, seconds=seconds,
                 on_progress=show)  # fmt: skip
    report.text = {"source": "random token ids", "tokens": len(ids)}
    report.settings["quality"] = NO_QUALITY
    return report


def _sizes(part: Part, tiny: bool) -> tuple[int, tuple[int, ...]]:
    return (256, tuple(256 * (1 + i) for i in range(len(part.sweep)))[:2]) if tiny else (
        part.context, part.sweep,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts in processes of their own, each within its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="the real model: a name or a file")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the records")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together")
    parser.add_argument("--part", choices=PARTS, help="one part in this process")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    args = parser.parse_args(argv)
    if args.part:
        report = report_of(PARTS[args.part], args.model, args.seconds, tiny=args.tiny)
        report.command = origin()["command"]
        report.write(args.out / PARTS[args.part].file)
        return _say_failures(report)
    if not (args.tiny or torch.cuda.is_available()):
        sys.exit("There is no GPU here; --tiny tries the script on the CPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.seconds
    return max(_in_process(name, args, deadline) for name in args.parts)


def _say_failures(report: Report) -> int:
    """Each row and point that failed, with its error; 1 where the GPU failed."""
    for row in (*report.rows, *report.sweep):
        if row.status == "failed":
            at = f" at {row.n_context:,} tokens" if isinstance(row, SweepPoint) else ""
            print(f"failed: {row.name}{at}: {row.note}", file=sys.stderr)
    for name, why in report.settings.get("missing_curves", {}).items():
        print(f"failed: perplexity by position: {name}: {why}", file=sys.stderr)
    if not report.complete:
        print(f"stopped by: {report.settings.get('stopped_by')}", file=sys.stderr, flush=True)
    return 0 if report.complete else 1


def _in_process(name: str, args: argparse.Namespace, deadline: float) -> int:
    """One part; 1 where it failed or there was no time left for it."""
    left = min(PARTS[name].seconds, deadline - time.perf_counter())
    if left < START_SECONDS:
        print(f"{name}: no time left", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu_compare", "--part", name]
    command += ["--model", args.model, "--out", str(args.out)]
    command += ["--seconds", str(left - START_SECONDS)]
    try:
        code = subprocess.run(
            [*command, *(["--tiny"] * args.tiny)], check=False, timeout=left + START_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        code = 1
    print(f"{name}: {'done' if code == 0 else 'failed'} after {time.perf_counter() - begin:.0f} s",
          file=sys.stderr, flush=True)  # fmt: skip
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
