"""The options of the benchmark and what they do, the same for both doors to it.

The doors are `python -m saccade.bench` and `saccade bench cpu`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.bench.cpu import OnProgress
    from saccade.bench.record import Benchmark

    Progress = Callable[[], AbstractContextManager[OnProgress]]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--quick", action="store_true", help="about a minute: a few cases")
    parser.add_argument(
        "--cases", metavar="WORD,...", type=_words, default=(),
        help='only cases with one of the words in their name, such as "decode" or "D64 N2048 bf16"',
    )  # fmt: skip
    parser.add_argument(
        "--backends", metavar="NAME,...", type=_words, default=("auto",),
        help="backends of saccade to time (default: the one that auto chooses)",
    )  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=_positive, help="default: torch's own")
    parser.add_argument(
        "--flex", action="store_true", help="also FlexAttention; compiles a minute a shape"
    )
    parser.add_argument("--json", metavar="FILE", help="store the record")
    parser.add_argument("--roofline", metavar="FILE", help="draw the record as a PNG")
    parser.add_argument("--markdown", metavar="FILE", help="the table for the docs")
    parser.add_argument(
        "--record", metavar="FILE", help="show or draw a stored record; nothing is measured"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and their work")


def execute(args: Namespace, progress: Progress | None = None) -> int:
    """Measure or read, show the table, write files, and end stdout with one line of JSON.

    Args:
        progress: a context that gives something to report progress to; default: lines on stderr.

    Returns:
        0; 1 where a kernel was wrong or broke down; 130 after Ctrl-C.
    """
    if args.list:
        _list(args)
        return 0
    if args.record:
        record = _stored(args.record)
    else:
        with (progress or _lines)() as show:
            record = _measured(args, show)
    _show(record)
    _write(record, args)
    print(record.to_json(), flush=True)
    if record.is_wrong:
        return 1
    return 0 if record.complete or args.record else 130


def _stored(name: str) -> Benchmark:
    from saccade.bench.record import read

    return read(Path(name).expanduser())


def _measured(args: Namespace, on_progress: OnProgress) -> Benchmark:
    from saccade.bench.cases import CASES, selected
    from saccade.bench.cpu import run
    from saccade.ops.attention import dispatch

    for name in args.backends:
        if name != "auto":
            dispatch.load(name)  # an unknown name is told before minutes are spent
    cases = selected(CASES, words=args.cases, quick=args.quick)
    with _threads(args.threads):
        return run(
            cases,
            backends=args.backends,
            with_flex=args.flex,
            quick=args.quick,
            on_progress=on_progress,
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's number of threads, which the kernels follow too, inside the `with`."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(record: Benchmark) -> None:
    from saccade.bench.table import print_record
    from saccade.report.terminal import to_stdout

    print_record(record, to_stdout())


def _write(record: Benchmark, args: Namespace) -> None:
    """The files that were asked for; the record first, since nothing can bring it back."""
    from saccade.report.files import write_whole

    if args.json:
        record.write(Path(args.json).expanduser())
    if args.markdown:
        from saccade.bench.table import to_markdown

        write_whole(Path(args.markdown).expanduser(), to_markdown(record))
    if args.roofline:
        from saccade.bench.roofline import to_png

        write_whole(Path(args.roofline).expanduser(), to_png(record))
    for name in (args.json, args.markdown, args.roofline):
        if name:
            print(f"Wrote {name}", file=sys.stderr)


def _list(args: Namespace) -> None:
    from saccade.bench.cases import CASES, selected

    for case in selected(CASES, words=args.cases, quick=args.quick):
        print(f"{case.name:38}{case.flops / 1e9:10.2f} GF {case.nbytes / 1e6:10.1f} MB")


@contextmanager
def _lines() -> Iterator[OnProgress]:
    def show(done: int, total: int, label: str) -> None:
        print(f"[{done + 1}/{total}] {label}", file=sys.stderr, flush=True)

    yield show


def _words(text: str) -> Sequence[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ArgumentTypeError("expected at least one name")
    return words


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
