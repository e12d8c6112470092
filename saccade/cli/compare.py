"""`saccade compare`: every technique side by side, each cell measured."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.cli.failure import need
from saccade.cli.outputs import check_outputs
from saccade.cli.parser import UsageError, whole_number

if TYPE_CHECKING:
    from saccade.evals.compare import Progress
    from saccade.hf.load import LoadedModel
    from saccade.report.comparison import Report

DEMO_MODEL = "smollm2"
PIPE_WIDTH = 180  # columns of a table that goes into a file: nothing is folded

EXAMPLES = """examples:
  saccade compare --quick
  saccade compare --model model.gguf --text book.txt --context 8192 --html report.html
  saccade compare --rows "flash,window,int8" --json - | tail -1 | jq .rows
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `saccade compare`."""
    parser.add_argument(
        "--model", "-m", metavar="PATH|NAME", default=DEMO_MODEL,
        help="a .gguf file, a folder saved by transformers, or a name (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to read (default: Python's help topics)"
    )
    parser.add_argument(
        "--context", metavar="N", type=whole_number(1), help="tokens read before the scored ones"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: under 3 minutes")
    parser.add_argument(
        "--rows", metavar="NAME,...", type=_names,
        help="measure only the rows with these names or parts of names, and the baseline",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE|-", help="the record; - is the last line of stdout")
    parser.add_argument("--html", metavar="FILE", help="one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="the picture")
    parser.add_argument("--markdown", metavar="FILE", help="the table for a README")


def run(args: Namespace) -> int:
    """Check everything that can be checked, measure, show, write."""
    _check(args)
    report = _measure(args)
    failed = _show(report, args)
    if not report.complete:
        print("Stopped. The finished rows are kept.", file=sys.stderr)
        return 130
    return 2 if failed else 0


def _check(args: Namespace) -> None:
    """Refuse now what would fail after minutes."""
    files = {f"--{name}": getattr(args, name) for name in ("html", "png", "markdown")}
    if args.json != "-":
        files = {"--json": args.json, **files}
    check_outputs(files)
    need("transformers", purpose="saccade compare")
    need("rich", purpose="the table of saccade compare")
    if args.html or args.png:
        need("matplotlib", purpose="the picture")
    if args.html:
        need("jinja2", "matplotlib", purpose="--html")


def _measure(args: Namespace) -> Report:
    from saccade.evals.text import read_text

    # The text first: what follows imports transformers, which takes seconds.
    text = None if args.text is None else read_text(Path(args.text).expanduser())
    from saccade.cli.progress import progress
    from saccade.evals import compare
    from saccade.hf.load import load_model

    print(f"Loading {args.model} ...", file=sys.stderr, flush=True)
    model = _with_tokenizer(load_model(args.model), args.model)
    with progress() as show:

        def on_progress(state: Progress) -> None:
            show(state.done, state.total, state.label)

        report = compare.run(
            model,
            text,
            context=args.context,
            quick=args.quick,
            rows=args.rows,
            on_progress=on_progress,
        )
    if args.text is not None:
        report.text["source"] = Path(args.text).name
    return report


def _with_tokenizer(model: LoadedModel, name: str) -> LoadedModel:
    for note in model.notes:
        print(f"Note: {note}", file=sys.stderr)
    if model.tokenizer is None:
        raise UsageError(
            f"{name} has no tokenizer that can be read; text has to become tokens. "
            "Give a model that brings one."
        )
    return model


def _show(report: Report, args: Namespace) -> bool:
    """Table, files, JSON line, in this order; whether a file could not be written.

    A file that fails does not take the others with it: the run may have taken long.
    """
    from rich.console import Console

    from saccade.report.terminal import print_report

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    print_report(report, Console(file=sys.stdout, width=width))
    failed = False
    for name in ("html", "png", "markdown", "json"):
        target = getattr(args, name)
        if target in (None, "-"):
            continue
        try:
            _write(name, Path(target).expanduser(), report)
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            print(f"saccade: {target} was not written: {said}.", file=sys.stderr)
            failed = True
        else:
            print(f"Wrote {target}", file=sys.stderr)
    if args.json == "-":
        print(report.to_json(), flush=True)
    return failed


def _write(name: str, path: Path, report: Report) -> None:
    from saccade.report.files import write_whole

    if name == "json":
        report.write(path)
    elif name == "html":
        from saccade.report.html import to_html

        write_whole(path, to_html(report))
    elif name == "png":
        from saccade.report.figures import to_png

        write_whole(path, to_png(report))
    else:
        from saccade.report.markdown import to_markdown

        write_whole(path, to_markdown(report))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--rows needs at least one name.")
    return names
