"""Steps over rings on one GPU: Mistral-7B's shape, window 4096, random bf16 weights.

    python -m benchmarks.gpu_mistral --out benchmarks/results/h200_mistral.json
    python -m benchmarks.gpu_mistral --short     # 8 layers, and no transformers beside them

A windowed model holds 4096 tokens whatever it has read, so the time of a token must not grow.
Before anything is timed, stepped logits behind a full ring are compared with float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from benchmarks.gpu_models import (
    CHUNK,
    LONG,
    SCHEMA,
    TINY,
    Ours,
    Sdpa,
    put,
    rate,
    relative,
    tokens,
)
from saccade.bench.gpu import on_gpu
from saccade.report.record import origin

SHAPE = {
    "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": LONG,
    "sliding_window": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = (4096, 32768, LONG - 256)


def shaped(layers: int) -> MistralConfig:
    """The shape, or a toy of it on a CPU."""
    small = {} if on_gpu() else TINY | {"sliding_window": 64}
    return MistralConfig(**(SHAPE | {"num_hidden_layers": layers} | small))


def check(length: int, steps: int = 16) -> dict[str, float]:
    """Worst relative error of the logits of steps against sdpa in float32, in four layers.

    Raises:
        RuntimeError: a step errs more than twice as much as sdpa in bf16.
    """
    config = shaped(4)
    ids = tokens(length + steps, config.vocab_size)

    def logits_of(subject: Any) -> list[torch.Tensor]:
        subject.read(ids[:length], CHUNK)
        return [subject.step(int(token)).clone() for token in ids[length:]]

    exact = Sdpa(config)
    peer = logits_of(exact)
    exact.model.float()
    exact.forget()
    truth = logits_of(exact)
    ours = Ours(config, length + steps)
    found = {"sdpa": peer, "steps": logits_of(ours)}
    ours.ctx.close()
    errors = {
        name: max(relative(a, b) for a, b in zip(logits, truth, strict=True))
        for name, logits in found.items()
    }
    if not errors["steps"] < 2 * errors["sdpa"]:
        raise RuntimeError(f"relative errors of logits {errors}; nothing is timed.")
    return errors


def decoding(subject: Any, config: MistralConfig, lengths: list[int]) -> dict[int, Any]:
    """Milliseconds a token behind each length."""
    found: dict[int, Any] = {}
    for length in lengths:
        subject.forget()
        subject.read(tokens(length, config.vocab_size), CHUNK)
        found[length] = rate(subject, 32 if isinstance(subject, Ours) else 8)
        print(type(subject).__name__, length, json.dumps(found[length]), flush=True)
    return found


def main() -> None:
    """Check, then time ours and transformers' own sliding cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--short", action="store_true", help="8 layers, only ours")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no part after that time")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    config = shaped(8 if arguments.short else 32)
    lengths = [70, 150, 200] if arguments.tiny else list(LENGTHS)
    what = f"Mistral-7B's shape, {config.num_hidden_layers} layers, window 4096, batch 1"
    record: dict[str, Any] = {"schema": SCHEMA, **origin(), "what": what}
    record["check"] = check(150 if arguments.tiny else 9000)
    put(arguments.out, record)
    subject: Any = Ours(config, LONG if on_gpu() else 512)
    record["ours"] = decoding(subject, config, lengths)
    record["cache_gib"] = subject.ctx.cache_bytes / 2**30  # behind the longest prompt
    put(arguments.out, record)
    subject.ctx.close()
    del subject
    if arguments.short or time.perf_counter() - begin > arguments.seconds:
        return
    record["sdpa"] = decoding(Sdpa(config), config, lengths[:2])
    put(arguments.out, record)


if __name__ == "__main__":
    main()
