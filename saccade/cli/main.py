"""`saccade`: the commands, and errors as one sentence.

Exit codes: 0 done, 1 a bug of ours (--traceback shows where), 2 something to change in the call,
130 stopped by Ctrl-C, 143 by SIGTERM, 141 the reader of the output is gone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from saccade.cli import (
    bench,
    chat,
    check,
    compare,
    compress,
    convert,
    doctor,
    generate,
    plan,
    report,
)
from saccade.cli import eval as evaluate  # a name that Python has too
from saccade.cli.failure import bug, sentence
from saccade.cli.stopping import stop_signals

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for _module in (compare, generate, chat, compress, plan, convert, check, doctor, evaluate):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, epilog=f"\b\n{_module.EXAMPLES}")(_module.run)
app.add_typer(bench.app, name="bench")
app.add_typer(report.app, name="report")


def _version(wanted: bool) -> None:
    if wanted:
        from saccade.version import __version__

        print(f"saccade {__version__}")
        raise typer.Exit


@app.callback()
def saccade(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="the version")
    ] = False,
) -> None:
    """saccade: long-context attention for PyTorch."""


def parse(words: Sequence[str]) -> Any:
    """The typer context of the command that `words` name, with the values of its options.

    Raises:
        TyperException: unknown words; typer.Exit: help or the version was printed.
    """
    command, path, rest = typer.main.get_command(app), "saccade", list(words)
    while isinstance(command, TyperGroup) and rest and rest[0] in command.commands:
        command, path = command.commands[rest[0]], f"{path} {rest.pop(0)}"
    return command.make_context(path, rest, help_option_names=["-h", "--help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the result is the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    _open_streams()
    came: list[int] = []
    try:
        with stop_signals(came):
            code = _run(["--help"] if words in ([], ["help"]) else words)
            sys.stdout.flush()
        return 128 + came[-1] if code == _STOPPED and came else code
    except KeyboardInterrupt as stop:
        print("Stopped.", file=sys.stderr)
        return getattr(stop, "code", _STOPPED)
    except BrokenPipeError:
        _nowhere(sys.stdout)
        return 141
    except Exception as error:
        if traceback:
            raise
        said = sentence(error)
        if said is None and came:  # other packages turn the stop into errors of their own
            print("Stopped.", file=sys.stderr)
            return 128 + came[-1]
        shown = bug(error) if said is None else said
        print(shown if shown.startswith("saccade") else f"saccade: {shown}", file=sys.stderr)
        return 1 if said is None else 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: else Python says it again at exit, with a traceback
            _nowhere(sys.stdout)


_STOPPED = 130


def _nowhere(stream: Any) -> None:
    """Let what a stream still holds go nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams() -> None:
    """Streams that a shell closed are empty; a name that cannot be shown must not break a table."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))
    with contextlib.suppress(AttributeError):  # some locales hide bytes that are no text
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _run(words: list[str]) -> int:
    """Parse and run; what typer prints by itself, help and the version, ends here."""
    try:
        with parse(words) as context:
            return context.command.invoke(context)
    except typer.Exit as done:
        return done.exit_code


if __name__ == "__main__":
    sys.exit(main())
