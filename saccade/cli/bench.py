"""`saccade bench`: how fast attention is here, next to the machine's limits and its peers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from saccade.cli.failure import UsageError, need
from saccade.cli.outputs import check_outputs, file_option
from saccade.cli.values import file_name, list_of, one_of, whole_number

CPU_EXAMPLES = """examples:
  saccade bench cpu --quick
  saccade bench cpu --cases decode --threads 2 --json record.json
  saccade bench cpu --record record.json --roofline roofline.png
"""
TUNE_EXAMPLES = """examples:
  saccade bench tune                      # on a CPU: rules for auto
  saccade bench tune --device cpu --out r.json  # a file for SACCADE_RULES
  saccade bench tune --out tuning.json    # on a GPU: all kernels, 10 min
  saccade bench tune --quick --kernels forward decode --dims 128
  SACCADE_TUNING=tuning.json python train.py    # use the table
"""


def kernel(text: str) -> str:
    """The name of a kernel that can be tuned."""
    from saccade.bench.tune_options import KERNELS

    return one_of(*KERNELS)(text)


Cases = Annotated[Any, typer.Option(
    "--cases", metavar="WORD,...", parser=list_of(str),
    help='only cases with one of the words in their name, such as "decode" or "D64 N2048 bf16"',
)]  # fmt: skip
Backends = Annotated[Any, typer.Option(
    "--backends", metavar="NAME,...", parser=list_of(str),
    help="backends of saccade to time (default: the one that auto chooses)",
)]  # fmt: skip
Threads = Annotated[Any, typer.Option(
    "--threads", metavar="N", parser=whole_number(1, 4096), help="default: torch's own"
)]  # fmt: skip
Flex = Annotated[bool, typer.Option(
    "--flex", help="also FlexAttention; compiles a minute a shape"
)]  # fmt: skip
Record = Annotated[
    str | None, file_option("--record", "show or draw a stored record; nothing is measured")
]
Listed = Annotated[bool, typer.Option("--list", help="name the cases and their work")]
Kernels = Annotated[Any, typer.Option(
    "--kernels", metavar="NAME...", parser=list_of(kernel),
    help="GPU: which kernels, such as forward and decode (default: all)",
)]  # fmt: skip
Dims = Annotated[Any, typer.Option(
    "--dims", metavar="D...", parser=list_of(whole_number(16, 512)),
    help="head dimensions (default: CPU 64 128, GPU 64 128 256)",
)]  # fmt: skip
Out = Annotated[str | None, typer.Option(
    "--out", metavar="FILE", parser=file_name,
    help="CPU: the rules (default: the user's cache folder, where auto finds them); GPU: the "
    "table (default: tuning-ARCHITECTURE.json here), whose rows are kept, so a stopped run goes on",
)]  # fmt: skip
TuneDevice = Annotated[Any, typer.Option(
    "--device", metavar="DEVICE", parser=one_of("auto", "cpu", "cuda"),
    help="auto (a GPU where there is one), cpu or cuda",
)]  # fmt: skip
Series = Annotated[Any, typer.Option(
    "--cases", metavar="WORD,...", parser=list_of(str),
    help='CPU: only calls with one of the words in their name, such as "prompt" or "bfloat16"',
)]  # fmt: skip
Again = Annotated[bool, typer.Option(
    "--again", help="GPU: measure rows that the file already holds"
)]  # fmt: skip

app = typer.Typer(help="How fast attention is here, and what is fastest on this machine.")


class SeveralWords(TyperCommand):
    """A command that reads `--dims 64 128` as `--dims 64,128`, and `--kernels` likewise."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join what follows these options up to the next one."""
        words: list[str] = []
        collects = False
        for word in args:
            if not collects or word.startswith("-") or words[-1] in ("--kernels", "--dims"):
                words.append(word)
            else:
                words[-1] += f",{word}"
            collects = word in ("--kernels", "--dims") or (collects and not word.startswith("-"))
        return super().parse_args(ctx, words)


@app.command("cpu", epilog=f"\b\n{CPU_EXAMPLES}")
def cpu(
    quick: Annotated[bool, typer.Option("--quick", help="about a minute: a few cases")] = False,
    cases: Cases = None,
    backends: Backends = None,
    threads: Threads = None,
    flex: Flex = False,
    json: Annotated[str | None, file_option("--json", "store the record")] = None,
    roofline: Annotated[str | None, file_option("--roofline", "draw the record as a PNG")] = None,
    markdown: Annotated[str | None, file_option("--markdown", "the table for the docs")] = None,
    record: Record = None,
    listed: Listed = False,
) -> int:
    """How fast attention is here, next to the limits of the machine."""
    check_outputs({"--json": json, "--markdown": markdown, "--roofline": roofline})
    if not listed:
        need("rich", purpose="the table of saccade bench")
    if roofline:
        need("matplotlib", purpose="--roofline")
    from saccade.bench import options
    from saccade.cli.progress import progress

    chosen = options.Options(
        quick=quick, cases=cases or (), backends=backends or ("auto",), threads=threads, flex=flex,
        json=json, roofline=roofline, markdown=markdown, record=record, list=listed,
    )  # fmt: skip
    try:
        return options.execute(chosen, progress)
    except (AttributeError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        if record is None:
            raise
        raise UsageError(
            f"--record {record} is no record that can be shown ({type(error).__name__}: {error}). "
            "Measure it again."
        ) from error


@app.command("tune", cls=SeveralWords, epilog=f"\b\n{TUNE_EXAMPLES}")
def tune(
    device: TuneDevice = "auto",
    kernels: Kernels = None,
    dims: Dims = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer lengths or candidates, fewer samples")
    ] = False,
    out: Out = None,
    again: Again = False,
    cases: Series = None,
    threads: Threads = None,
    json: Annotated[
        str | None, file_option("--json", "CPU: store the figures in a record of their own")
    ] = None,
) -> int:
    """Measure what is fastest here: launches of a GPU, backends of a CPU."""
    check_outputs({"--out": out, "--json": json})
    need("rich", purpose="the table of saccade bench")
    import torch

    if device == "cuda" or (device == "auto" and (kernels or torch.cuda.is_available())):
        _only("a CPU", {"--cases": cases, "--threads": threads, "--json": json})
        return _tune_gpu(kernels, dims, quick=quick, out=out, again=again)
    _only("a GPU", {"--kernels": kernels, "--again": again})
    from saccade.bench import rule_options as rules

    if cases and not out:
        raise UsageError("--cases measures a part of the rules: name a file for them with --out.")
    chosen = rules.Options(
        dims=dims or rules.DIMS, quick=quick, cases=cases or (), threads=threads, out=out, json=json
    )
    return rules.execute(chosen)


def _tune_gpu(kernels: Any, dims: Any, *, quick: bool, out: str | None, again: bool) -> int:
    from saccade.bench import tune_options as tuning

    bench = tuning.on_gpu()  # says in a sentence where there is none
    chosen = tuning.Options(
        kernels=kernels or tuning.KERNELS, dims=dims or tuning.DIMS, quick=quick, out=out,
        again=again,
    )  # fmt: skip
    return tuning.execute(chosen, bench)


def _only(where: str, given: dict[str, Any]) -> None:
    """Refuse options that mean nothing on the device that is measured."""
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is an option of {where}: leave it out, or choose --device.")
