"""`saccade compare`: every technique side by side, each cell measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.failure import need
from saccade.cli.lengths import length
from saccade.cli.loading import check_model, load
from saccade.cli.outputs import check_outputs, file_option, names_of_a_part
from saccade.cli.shared_options import Device, DType, Model, Weights
from saccade.cli.tokens import tokenizer_of
from saccade.cli.values import file_name, list_of

if TYPE_CHECKING:
    from saccade.evals.compare import Progress
    from saccade.report.comparison import Report

DEMO_MODEL = "smollm2"

EXAMPLES = """examples:
  saccade compare --quick
  saccade compare -m model.gguf --text book.txt --context 8k --html out.html
  saccade compare -m model.gguf --sweep 1k,4k,16k,64k --html out.html
  saccade compare --rows "flash,window,int8" --json - | tail -1 | jq .rows
"""


def run(
    model: Model = DEMO_MODEL,
    device: Device = "auto",
    dtype: DType = "auto",
    weights: Weights = "file",
    text: Annotated[
        str | None, file_option("--text", "UTF-8 text to read (default: Python's help topics)")
    ] = None,
    context: Annotated[Any, typer.Option(
        "--context", metavar="N", parser=length,
        help="tokens read before the scored ones: 4096 or 4k, also past the trained length",
    )] = None,
    sweep: Annotated[Any, typer.Option(
        "--sweep", metavar="N,...", parser=list_of(length),
        help="measure a few configurations at these lengths too, such as 1k,4k,16k",
    )] = None,
    quick: Annotated[bool, typer.Option(
        "--quick", help="fewer rows, small sizes: a minute and a half on two cores"
    )] = False,
    rows: Annotated[Any, typer.Option(
        "--rows", metavar="NAME,...", parser=list_of(str),
        help="only the rows with these names or parts of names, and the two of transformers",
    )] = None,
    json: Annotated[str | None, typer.Option(
        "--json", metavar="FILE|-", parser=file_name,
        help="the record; - is the last line of stdout",
    )] = None,
    html: Annotated[str | None, file_option("--html", "one self-contained page")] = None,
    png: Annotated[str | None, file_option("--png", "the picture")] = None,
    markdown: Annotated[str | None, file_option("--markdown", "the table for a README")] = None,
) -> int:  # fmt: skip
    """Measure what each technique saves and costs, on your model."""
    check_model(model)
    files = {"html": html, "png": png, "markdown": markdown, "json": json}
    _check(files)
    options = {"context": context, "quick": quick, "rows": rows, "sweep": sweep or ()}
    report = _measure((model, device, dtype, weights), text, **options)
    if report.complete:
        return 2 if _show(report, files) else 0
    files = names_of_a_part(files)
    _show(report, files)
    why = report.settings.get("stopped_by")
    kept = any(file not in (None, "-") for file in files.values())
    print(
        f"Stopped{': ' + why if why else '.'} The finished rows are "
        f"{'in the files named above' if kept else 'above'}. Rows are measured in turns, so the "
        "same call begins with the first again"
        f"{', and leaves these files as they are.' if kept else '.'}",
        file=sys.stderr,
    )
    return 2 if why else 130


def _check(files: dict[str, str | None]) -> None:
    """Refuse now what would fail after minutes."""
    written = {f"--{name}": file for name, file in files.items() if (name, file) != ("json", "-")}
    check_outputs(written)
    need("transformers", purpose="saccade compare")
    need("rich", purpose="the table of saccade compare")
    if files["png"]:
        need("matplotlib", purpose="the picture")
    if files["html"]:
        need("jinja2", purpose="--html")


def _measure(source: tuple[str, str, str, str], text_file: str | None, **options: Any) -> Report:
    from saccade.evals.text import read_text

    # The text first: what follows imports transformers, which takes seconds.
    text = None if text_file is None else read_text(Path(text_file).expanduser())
    from saccade.cli.progress import progress
    from saccade.evals import compare

    model = load(*source)
    tokenizer_of(model)  # text has to become tokens
    with progress() as show:

        def on_progress(state: Progress) -> None:
            show(state.done, state.total, state.label)

        report = compare.run(model, text, on_progress=on_progress, **options)
    if text_file is not None:
        report.text["source"] = Path(text_file).name
    return report


def _show(report: Report, files: dict[str, str | None]) -> bool:
    """Table, files, JSON line, in this order; whether a file could not be written.

    A file that fails does not take the others with it: the run may have taken long.
    """
    from saccade.report.terminal import print_report, to_stdout

    print_report(report, to_stdout())
    failed = False
    for name, target in files.items():
        if target is None or target == "-":
            continue
        try:
            _write(name, Path(target).expanduser(), report)
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            print(f"saccade: {target} was not written: {said}.", file=sys.stderr)
            failed = True
        else:
            print(f"Wrote {target}", file=sys.stderr)
    if files["json"] == "-":
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
