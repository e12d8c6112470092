"""Every GPU record in order of importance, within a time; each is written as soon as it is made.

    python -m benchmarks.gpu_visit --out results --seconds 570
    python -m benchmarks.gpu_visit --out results --seconds 570 --only llama mistral
    SACCADE_REVISION=abc123 python -m benchmarks.gpu_visit ...   # on a copy without git metadata

Kernels are compiled first, by several processes into Triton's cache, so that the time of the GPU
goes into measuring.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MODULES = "benchmarks"


@dataclass(frozen=True, slots=True)
class Part:
    """One record.

    Attributes:
        record: name of its file; module: of benchmarks; options: of its command.
        share: of the time that is left, at most; compiles: whether it has `--warm`.
    """

    record: str
    module: str
    options: tuple[str, ...] = ()
    share: float = 1.0
    compiles: bool = False


PARTS = {
    "rules": Part("h200_rules", "gpu_rules", share=0.5, compiles=True),
    "attention": Part("h200_attention", "gpu_attention", share=0.6, compiles=True),
    "llama": Part("h200_llama", "gpu_llama", ("--short",), share=0.8),
    "mistral": Part("h200_mistral", "gpu_mistral", ("--short",)),
    "latent": Part("h200_latent", "gpu_latent", compiles=True),
    "peers": Part("h200_peers", "gpu_peers", compiles=True),
}


def main() -> int:
    """Run the parts; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small problems on a CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    parts = [PARTS[name] for name in args.only]
    if not args.tiny:
        _compile([part for part in parts if part.compiles], deadline)
    failed = 0
    for part in parts:
        left = deadline - time.monotonic()
        if left < 20:
            print(f"{part.record}: no time is left", flush=True)
            failed += 1
            continue
        failed += not _measured(part, args.out, left * part.share, args.tiny)
    return failed


def _command(part: Part, *options: str) -> list[str]:
    return [sys.executable, "-m", f"{MODULES}.{part.module}", *part.options, *options]


def _measured(part: Part, out: Path, seconds: float, tiny: bool) -> bool:
    """Whether the part ended well; it stops by itself, and is stopped where that fails."""
    options = ["--out", str(out / f"{part.record}.json"), "--seconds", f"{seconds:.0f}"]
    begin = time.monotonic()
    try:
        command = _command(part, *options, *(["--tiny"] * tiny))
        code = subprocess.run(command, check=False, timeout=seconds + 60).returncode
    except subprocess.TimeoutExpired:
        code = None
    print(f"{part.record}: exit {code} after {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def _compile(parts: list[Part], deadline: float) -> None:
    """Compile every kernel in as many processes as there are cores, in a third of the time."""
    workers = min(14, os.cpu_count() or 1)
    limit = (deadline - time.monotonic()) / 3
    for part in parts:
        begin = time.monotonic()
        seconds = limit / len(parts)
        options = ("--seconds", f"{seconds:.0f}", "--warm")
        commands = [_command(part, *options, str(i), str(workers)) for i in range(workers)]
        running = [subprocess.Popen(command) for command in commands]
        for process in running:
            try:
                process.wait(max(1.0, begin + seconds + 30 - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        print(f"{part.module} compiled in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
