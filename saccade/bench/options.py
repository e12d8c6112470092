"""What `saccade bench cpu` does with its options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.bench.cpu import OnProgress
    from saccade.bench.record import Benchmark

    Progress = Callable[[], AbstractContextManager[OnProgress]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure and which files to write.

    Attributes:
        quick: a few cases and fewer samples.
        cases: only cases with one of these words in their name; none for all.
        backends: names of this package's backends; "auto" is the one it would choose.
        threads: of torch and the kernels; default torch's own.
        flex: also time compiled FlexAttention.
        json, roofline, markdown: files to write.
        record: a stored record to show or draw; nothing is measured.
        list: only name the cases and their work.
    """

    quick: bool = False
    cases: Sequence[str] = ()
    backends: Sequence[str] = ("auto",)
    threads: int | None = None
    flex: bool = False
    json: str | None = None
    roofline: str | None = None
    markdown: str | None = None
    record: str | None = None
    list: bool = False


def execute(options: Options, progress: Progress) -> int:
    """Measure or read, show the table, write files, and end stdout with one line of JSON.

    Returns:
        0; 1 where a kernel was wrong or broke down; 130 after Ctrl-C.
    """
    if options.list:
        _list(options)
        return 0
    if options.record:
        from saccade.bench.record import read

        record = read(Path(options.record).expanduser())
    else:
        with progress() as show:
            record = _measured(options, show)
    from saccade.bench.table import print_record
    from saccade.report.terminal import to_stdout

    print_record(record, to_stdout())
    _write(record, options)
    print(record.to_json(), flush=True)
    if record.is_wrong:
        return 1
    return 0 if record.complete or options.record else 130


def _measured(options: Options, on_progress: OnProgress) -> Benchmark:
    from saccade.bench.cases import CASES, selected
    from saccade.bench.cpu import run
    from saccade.ops.attention import dispatch

    for name in options.backends:
        if name != "auto":
            dispatch.load(name)  # raises for an unknown name before minutes are spent
    cases = selected(CASES, words=options.cases, quick=options.quick)
    with threads_set(options.threads):
        return run(
            cases,
            backends=options.backends,
            with_flex=options.flex,
            quick=options.quick,
            on_progress=on_progress,
        )


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Torch's number of threads, which the kernels follow too, inside the `with`."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(record: Benchmark, options: Options) -> None:
    """Write the requested files; the record first, since it cannot be computed from the others."""
    from saccade.report.files import write_whole

    if options.json:
        record.write(Path(options.json).expanduser())
    if options.markdown:
        from saccade.bench.table import to_markdown

        write_whole(Path(options.markdown).expanduser(), to_markdown(record))
    if options.roofline:
        from saccade.bench.roofline import to_png

        write_whole(Path(options.roofline).expanduser(), to_png(record))
    for name in (options.json, options.markdown, options.roofline):
        if name:
            print(f"Wrote {name}", file=sys.stderr)


def _list(options: Options) -> None:
    from saccade.bench.cases import CASES, selected

    for case in selected(CASES, words=options.cases, quick=options.quick):
        print(f"{case.name:38}{case.flops / 1e9:10.2f} GF {case.nbytes / 1e6:10.1f} MB")
