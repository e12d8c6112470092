"""`saccade bench cpu`: how fast attention is here, next to the machine's limits and its peers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from saccade.bench import options
from saccade.cli.failure import need
from saccade.cli.outputs import check_outputs
from saccade.cli.progress import progress

EXAMPLES = """examples:
  saccade bench cpu --quick
  saccade bench cpu --cases decode --threads 2 --json record.json
  saccade bench cpu --record record.json --roofline roofline.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `saccade bench`."""
    parser.add_argument("machine", choices=("cpu",), help="what to measure")
    options.add_arguments(parser)


def run(args: Namespace) -> int:
    """Refuse now what would fail after minutes, then measure."""
    files = ("json", "markdown", "roofline")
    check_outputs({f"--{name}": getattr(args, name) for name in files})
    if args.list:
        return options.execute(args)
    need("rich", purpose="the table of saccade bench")
    if args.roofline:
        need("matplotlib", purpose="--roofline")
    return options.execute(args, progress)
