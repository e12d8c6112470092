"""`saccade report`: stored records of `saccade compare`, shown again or side by side."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.failure import need
from saccade.cli.outputs import check_outputs, file_option
from saccade.cli.values import file_name

if TYPE_CHECKING:
    from saccade.report.comparison import Report

DIFF_EXAMPLES = """examples:
  saccade report diff before.json after.json
  saccade report diff before.json after.json --json - | tail -1 | jq .unfair
"""
HTML_EXAMPLES = """examples:
  saccade report html out/compare.json -o report.html
"""

app = typer.Typer(help="Stored records of saccade compare, shown again or side by side.")

Json = Annotated[str | None, typer.Option(
    "--json", metavar="FILE|-", parser=file_name,
    help="the differences; - is the last line of stdout",
)]  # fmt: skip


def _record(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, parser=file_name, help=help)


@app.command("diff", epilog=f"\b\n{DIFF_EXAMPLES}")
def diff(
    old: Annotated[str, _record("OLD.json", "a record that saccade compare --json wrote")],
    new: Annotated[str, _record("NEW.json", "a later one")],
    json: Json = None,
) -> int:
    """What became better or worse from one record to another, row by row."""
    if json != "-":
        check_outputs({"--json": json})
    need("rich", purpose="the table of saccade report")
    from saccade.report.diff import difference
    from saccade.report.files import write_whole
    from saccade.report.terminal import print_difference, to_stdout

    found = difference(_read(old), _read(new))
    print_difference(found, to_stdout())
    said = json_text.dumps(found.to_dict(), allow_nan=False)
    if json == "-":
        print(said, flush=True)
    elif json is not None:
        write_whole(Path(json).expanduser(), f"{said}\n")
    return 0


@app.command("html", epilog=f"\b\n{HTML_EXAMPLES}")
def html(
    record: Annotated[str, _record("RECORD.json", "a record that saccade compare --json wrote")],
    out: Annotated[str, file_option("-o", "the page")],
) -> int:
    """Draw the page of a stored record."""
    check_outputs({"-o": out})
    need("jinja2", purpose="saccade report html")
    from saccade.report.files import write_whole
    from saccade.report.html import to_html

    write_whole(Path(out).expanduser(), to_html(_read(record)))
    return 0


def _read(name: str) -> Report:
    from saccade.report.comparison import read

    return read(Path(name).expanduser())
