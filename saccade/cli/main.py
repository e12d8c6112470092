"""`saccade`: finds the subcommand, runs it, and turns errors into one sentence.

Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 something to change in the call,
130 stopped by Ctrl-C, 141 nobody reads the output.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from saccade.cli.failure import sentence
from saccade.cli.parser import Parser, UsageError, nearest

COMMANDS = {
    "compare": "measure what each technique saves and costs, on your model and machine",
    "generate": "continue a prompt, with any of the techniques",
    "chat": "talk without end in memory that does not grow",
    "plan": "how much memory a model will need, before it is loaded",
    "bench": "how fast attention is here, next to the limits of the machine",
    "doctor": "what can run here, and what to do about what cannot",
}

USAGE = """usage: saccade COMMAND [options]

saccade: long-context attention for PyTorch.

{commands}

  saccade COMMAND --help   the options of a command
  saccade --version        the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the result is the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a name in the record must not break a table
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        said = sentence(error)
        if said is None or "--traceback" in words:
            raise
        print(said if said.startswith("saccade ") else f"saccade: {said}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else ""
    if command in ("-h", "--help", "help", ""):
        width = max(map(len, COMMANDS)) + 3
        listed = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=listed), end="")
        return 0
    if command == "--version":
        from saccade import __version__

        print(f"saccade {__version__}")
        return 0
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        raise UsageError(f"there is no command {command!r}.{hint}")
    module = import_module(f"saccade.cli.{command}")
    parser = Parser(
        prog=f"saccade {command}", description=COMMANDS[command], epilog=module.EXAMPLES
    )
    module.add_arguments(parser)
    return module.run(parser.parse(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
