"""`python -m saccade.bench`: the CPU benchmark without the command line tool around it."""

from __future__ import annotations

import argparse
import sys

from saccade.bench.options import add_arguments, execute
from saccade.core import BadInput


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m saccade.bench", description=__doc__, allow_abbrev=False
    )
    add_arguments(parser)
    try:
        return execute(parser.parse_args(argv))
    except (BadInput, OSError, ValueError) as error:
        print(f"saccade bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
