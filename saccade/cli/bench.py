"""`saccade bench`: how fast attention is here, next to the machine's limits and its peers."""

from __future__ import annotations

from argparse import Namespace

from saccade.bench import options, tune_options
from saccade.cli.failure import need
from saccade.cli.outputs import check_outputs
from saccade.cli.parser import Parser
from saccade.cli.progress import progress

EXAMPLES = """examples:
  saccade bench cpu --quick
  saccade bench cpu --cases decode --threads 2 --json record.json
  saccade bench cpu --record record.json --roofline roofline.png
  saccade bench tune --quick --out tuning.json
"""
TUNE_EXAMPLES = """examples:
  saccade bench tune --out tuning.json          # every kernel, some ten minutes
  saccade bench tune --quick --kernels forward decode --dims 128
  SACCADE_TUNING=tuning.json python train.py    # use the table
"""
COMMANDS = {
    "cpu": "how fast attention is here, next to the limits of the machine",
    "tune": "find the fastest launch of each GPU kernel on this card, and write a table of them",
}


def add_arguments(parser: Parser) -> None:
    """The options of `saccade bench`."""
    cpu = parser.add_command("cpu", help=COMMANDS["cpu"], description=COMMANDS["cpu"])
    options.add_arguments(cpu)
    tune = parser.add_command(
        "tune", help=COMMANDS["tune"], description=COMMANDS["tune"], epilog=TUNE_EXAMPLES
    )
    tune_options.add_arguments(tune)


def run(args: Namespace) -> int:
    """Refuse now what would fail after minutes, then measure."""
    if args.command == "tune":
        check_outputs({"--out": args.out})
        bench = tune_options.on_the_card()  # says in a sentence where there is none
        need("rich", purpose="the table of saccade bench")
        return tune_options.execute(args, bench)
    files = ("json", "markdown", "roofline")
    check_outputs({f"--{name}": getattr(args, name) for name in files})
    if args.list:
        return options.execute(args)
    need("rich", purpose="the table of saccade bench")
    if args.roofline:
        need("matplotlib", purpose="--roofline")
    return options.execute(args, progress)
