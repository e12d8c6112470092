"""How many sessions are lost when a process that saves them is killed at random moments?

A child reads tokens and saves in a loop, telling through a pipe what it has saved.  It gets
SIGKILL at a random moment; then the file must load, and hold no less than what the child said.

    python benchmarks/kill_sessions.py --kills 500
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import saccade
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


def save_forever(model: torch.nn.Module, path: Path, told: int) -> None:
    """Read a token, save, say how many tokens the file now holds; until killed."""
    with saccade.Context(model) as ctx:
        sampler = load_session(path, ctx)
        while True:
            list(ctx.stream(n_predict=1, sampler=sampler))
            save_session(path, ctx, sampler)
            os.write(told, struct.pack("<q", ctx.seen))


def one_kill(model: torch.nn.Module, path: Path, seconds: float) -> int:
    """Kill a saving child after that time; the tokens of the last save it told of, 0 for none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            save_forever(model, path, writer)
        finally:  # only a failure gets here
            os._exit(1)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child failed before it was killed"
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    whole = len(said) // 8 * 8
    return struct.unpack("<q", said[whole - 8 : whole])[0] if whole else 0


def run(kills: int, folder: Path, seed: int) -> dict[str, int]:
    """Kill that many times; the figures."""
    torch.set_num_threads(1)  # so that a forked child has all the threads it needs
    chance, model, path = random.Random(seed), tiny_model(seed), folder / "session"
    with saccade.Context(model) as ctx:
        list(ctx.stream(torch.arange(1, 400) % 120, n_predict=1))
        save_session(path, ctx)
        held = first = ctx.seen
    lost = 0
    for _ in range(kills):
        promised = max(held, one_kill(model, path, chance.uniform(0.005, 0.15)))
        try:
            with saccade.Context(model) as ctx:
                load_session(path, ctx)
                held = ctx.seen
        except (saccade.BadInput, OSError) as error:
            print(error, file=sys.stderr)
            held = 0
        lost += held < promised
    parts = len(list(folder.glob(".session.*.part")))
    return {
        "kills": kills,
        "killed_while_writing": parts,
        "saves": held - first,
        "bytes_per_session": path.stat().st_size,
        "sessions_lost": lost,
    }


def main() -> int:
    """Print the figures as JSON; 1 where a session was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = run(args.kills, args.folder or Path(temporary), args.seed)
    print(json.dumps(figures))
    return 1 if figures["sessions_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
