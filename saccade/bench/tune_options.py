"""What `saccade bench tune` does with its options on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saccade.bench import tune as tuner
from saccade.bench import tune_work
from saccade.core import BadInput
from saccade.ops.gpu.support import architecture
from saccade.ops.tuning import files as launches
from saccade.ops.tuning import tables as tuning
from saccade.ops.tuning.files import LaunchFile
from saccade.report.files import write_whole

if TYPE_CHECKING:
    from saccade.bench.tune_work import Sizes

DIMS = (64, 128, 256)
KERNELS = tuple(tune_work.SHAPES)
NO_GPU = (
    "launches are measured on an NVIDIA GPU, Ampere or newer, and torch finds none here. "
    "Run saccade bench tune on the machine whose GPU the table is for (saccade doctor says what "
    "was found), or with --device cpu for rules of this CPU."
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where candidates run and how they are timed; tests bring one of their own.

    Attributes:
        sizes: of the problems, quick and full.
        ceilings: what the GPU does at best, for the record.
    """

    device: str
    dtype: torch.dtype
    timer: tuner.Timer
    sizes: Callable[[bool], Sizes]
    ceilings: Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to tune and where the table goes.

    Attributes:
        kernels: which ones; dims: head dimensions, a row serves those up to it.
        quick: shorter problems and four candidates a row.
        out: the table; default tuning-ARCHITECTURE.json here.
        again: also measure rows that the file already holds.
    """

    kernels: Sequence[str] = KERNELS
    dims: Sequence[int] = DIMS
    quick: bool = False
    out: str | None = None
    again: bool = False


def execute(options: Options, bench: Bench | None = None) -> int:
    """Measure, write the table after every row, show it, and say how it is used.

    Returns:
        0; 1 where a row has no right launch; 130 after Ctrl-C.
    """
    bench = bench or on_gpu()
    arch = architecture(torch.device(bench.device))
    path = Path(options.out or f"tuning-{arch}.json").expanduser()
    file = _file(path, arch)
    found: list[tuner.Found] = []
    complete = True
    try:
        file.measured = facts(bench)
        _measure(options, bench, path, file, found)
    except KeyboardInterrupt:
        complete = False
    except tuner.BrokenGPU as error:
        complete = False
        print(f"The GPU broke down: {error}", file=sys.stderr)
    from saccade.bench.tune_table import print_found
    from saccade.report.terminal import to_stdout

    print_found(file.measured, found, to_stdout(), complete=complete)
    if any(file.kernels.values()):
        _say_what_next(path, complete=complete)
    if not complete:
        return 130
    return 1 if any(each.best is None for each in found) else 0


def on_gpu() -> Bench:
    """The bench of this machine's GPU.

    Raises:
        BadInput: there is none.
    """
    from saccade.bench import gpu
    from saccade.ops.gpu.support import has_triton

    if not torch.cuda.is_available() or not has_triton(torch.device("cuda")):
        raise BadInput(NO_GPU)

    def timer(runs: Sequence[tune_work.Run]) -> float:
        return gpu.seconds(runs[0], 9, 2) if len(runs) == 1 else gpu.graph_seconds(runs, repeats=9)

    def sizes(quick: bool) -> Sizes:
        return tune_work.QUICK if quick else tune_work.FULL

    return Bench("cuda", torch.bfloat16, timer, sizes, gpu.ceilings)


def facts(bench: Bench) -> dict[str, Any]:
    """What rows of a table belong to: the GPU, its ceilings, and what every record says."""
    from saccade.report import environment
    from saccade.report.record import origin

    names = environment.gpu_names() if bench.device == "cuda" else ["no GPU: the interpreter"]
    return {
        "gpu": names[0],
        **origin(),
        "type": str(bench.dtype).removeprefix("torch."),
        "ceilings": {name: round(value, 1) for name, value in bench.ceilings().items()},
    }


def _measure(
    options: Options, bench: Bench, path: Path, file: LaunchFile, found: list[tuner.Found]
) -> None:
    jobs = [(kernel, dim) for kernel in options.kernels for dim in sorted(set(options.dims))]
    for at, (kernel, dim) in enumerate(jobs, 1):
        if tuner.has_row(file, kernel, dim) and not options.again:
            print(f"[{at}/{len(jobs)}] {kernel} {dim}: kept from {path}", file=sys.stderr)
            continue
        tried = tuner.candidates(kernel, dim, quick=options.quick)
        said = f"[{at}/{len(jobs)}] {kernel} {dim}: {len(tried)} candidates"
        print(said, file=sys.stderr, flush=True)
        example = torch.empty(0, dtype=bench.dtype, device=bench.device)
        each = tuner.Found(kernel, dim, tuning.pick(tuning.KERNELS[kernel], example, dim))

        def make(kernel: str = kernel, dim: int = dim) -> tune_work.Work:
            sizes = bench.sizes(options.quick)
            return tune_work.work(kernel, dim, sizes, bench.device, bench.dtype)

        tuner.tune(each, make, tried, bench.timer)
        found.append(each)
        file.trials = [t for t in file.trials if (t.get("kernel"), t.get("dim")) != (kernel, dim)]
        tuner.enter(file, each)
        write_whole(path, launches.to_json(file))


def _file(path: Path, arch: str) -> LaunchFile:
    """The file to go on with, or an empty one.

    Raises:
        BadInput: it is the table of another GPU, or none.
    """
    if not path.exists():
        return LaunchFile(architecture=arch)
    file = launches.read(path, tuning.KERNELS)
    if file.architecture != arch:
        raise BadInput(
            f"{path} is a table for {file.architecture}, and this GPU is {arch}. "
            "Choose another --out."
        )
    return file


def _say_what_next(path: Path, *, complete: bool) -> None:
    if not complete:
        print(f"{path} holds the rows measured so far. The same command goes on with the rest.")
    print(f"Wrote {path}. To use it: export {tuning.VARIABLE}={path.resolve()}")
