"""How many sessions are lost when a process that saves them is killed at random?

A child reads tokens and saves in a loop, reporting through a pipe what it has saved.  Then the file
must load, and hold no less than what the child reported.  Two ways to die:

    at a moment   SIGKILL from outside, anywhere in reading, saving or renaming
    at a byte     the kernel ends the child when its file reaches a random length (RLIMIT_FSIZE)

    python benchmarks/kill_sessions.py --kills 500 --cuts 500 --out record.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import saccade
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime.session import load_session, save_session


def tiny_model(seed: int) -> torch.nn.Module:
    """A random model with enough cache for a save to take a while."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, eos_token_id=None,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def save_forever(model: torch.nn.Module, path: Path, pipe: int) -> None:
    """Read a token, save, say how many tokens the file now holds; until killed."""
    with saccade.Context(model) as ctx:
        sampler = load_session(path, ctx)
        while True:
            list(ctx.stream(n_predict=1, sampler=sampler))
            save_session(path, ctx, sampler)
            os.write(pipe, struct.pack("<q", ctx.seen))


def die_at_byte(size: int) -> None:
    """From now on the kernel kills this process when it writes a file beyond that length."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def one_death(
    model: torch.nn.Module, path: Path, *, seconds: float | None = None, size: int | None = None
) -> int:
    """End a saving child; the tokens of the last save it reported, 0 for none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            if size is not None:
                die_at_byte(size)
            save_forever(model, path, writer)
        finally:  # only a failure gets here
            os._exit(1)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child failed before it was killed"
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    whole = len(said) // 8 * 8
    return struct.unpack("<q", said[whole - 8 : whole])[0] if whole else 0


class Trial:
    """A session on disk, and what became of it.

    Attributes:
        in_file: tokens that the file stores; lost: how often it stored fewer than were saved.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.model, self.folder, self.path = tiny_model(seed), folder, folder / "session"
        with saccade.Context(self.model) as ctx:
            list(ctx.stream(torch.arange(1, 400) % 120, n_predict=1))
            save_session(self.path, ctx)
            self.in_file = self.first = ctx.seen
        self.lost = self.while_writing = 0

    def kill(self, *, seconds: float | None = None, size: int | None = None) -> None:
        """Start a child, kill it, and load the file."""
        saved = max(self.in_file, one_death(self.model, self.path, seconds=seconds, size=size))
        try:
            with saccade.Context(self.model) as ctx:
                load_session(self.path, ctx)
                self.in_file = ctx.seen
        except (saccade.BadInput, OSError) as error:
            print(error, file=sys.stderr)
            self.in_file = 0
        self.lost += self.in_file < saved
        for part in self.folder.glob(".session.*.part"):
            self.while_writing += 1
            part.unlink()


def run(kills: int, cuts: int, folder: Path, seed: int) -> dict[str, int]:
    """Kill that many times at a moment and cut that many times at a byte; the figures."""
    torch.set_num_threads(1)  # so that a forked child has all the threads it needs
    chance, trial = random.Random(seed), Trial(folder, seed)
    for _ in range(kills):
        trial.kill(seconds=chance.uniform(0.005, 0.15))
    caught = trial.while_writing
    for _ in range(cuts):
        trial.kill(size=chance.randrange(1, trial.path.stat().st_size))
    return {
        "kills_at_a_moment": kills,
        "of_these_while_writing": caught,
        "kills_at_a_byte": cuts,
        "of_these_while_writing_at_a_byte": trial.while_writing - caught,
        "saves": trial.in_file - trial.first,
        "bytes_per_session": trial.path.stat().st_size,
        "sessions_lost": trial.lost,
    }


def main() -> int:
    """Print the figures as JSON; 1 where a session was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="at a random moment")
    parser.add_argument("--cuts", type=int, default=300, help="at a random byte of the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="where the record goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = run(args.kills, args.cuts, args.folder or Path(temporary), args.seed)
    print(json.dumps(figures))
    if args.out is not None:
        write_whole(args.out, as_text({"schema": "saccade.kills/1", **origin(), **figures}))
    return 1 if figures["sessions_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
