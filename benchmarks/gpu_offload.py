"""Keys in host memory on one GPU: the link, then decoding against what the link needs.

    python -m benchmarks.gpu_offload --seconds 240 --out benchmarks/results/h200_offload.json

Llama-3.1-8B's shape, random bf16 weights, batch 1. `link` copies as many bytes as the keys and
values of a step have, from page-locked memory, and nothing else. Rows are milliseconds of a
token, the median and mean of one run: of `Context`, of `generate()` under `attach`, and of
`generate()` with the offloaded cache of transformers. Before anything is timed, logits over host
memory are compared with those over keys on the GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, StoppingCriteriaList

import saccade
from benchmarks.gpu_generate import Clock
from benchmarks.gpu_models import DEVICE, SHAPE, TINY, peak, put, random_model, relative, tokens
from saccade.bench.gpu import on_gpu, synchronize
from saccade.cache.staging import TAIL
from saccade.report.record import origin
from saccade.runtime import ContextParams, DecodeStep
from saccade.sparse import Strided

SCHEMA = "saccade.offload/1"
FEW, MANY = 4, 20
TURN = TAIL + 10
"""Tokens in which the newest are moved to the host once, and the step is captured again."""
LIMIT = 2e-2  # of the norm of logits: both run the same kernels over keys in another layout
LENGTHS = (32768, 8192)
PIECE = 1 << 23
HOST: dict[str, Any] = {"offload_kqv": False}
SPARSE = Strided(block=64, window_blocks=16, stride=8)


def key_bytes(config: LlamaConfig, length: int) -> int:
    """Bytes of keys and values of all layers in bf16."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return 2 * 2 * width * length * config.num_hidden_layers


def link(total: int) -> dict[str, float]:
    """Milliseconds of copying so many bytes to the GPU in pieces, best of five, and GB/s."""
    count = max(1, min(total // PIECE, 64))
    host = [torch.zeros(PIECE, dtype=torch.uint8, pin_memory=on_gpu()) for _ in range(count)]
    device = [torch.empty(PIECE, dtype=torch.uint8, device=DEVICE) for _ in range(count)]
    best = float("inf")
    for _ in range(5):
        synchronize()
        begin = time.perf_counter()
        for i in range(total // PIECE):
            device[i % count].copy_(host[i % count], non_blocking=True)
        synchronize()
        best = min(best, time.perf_counter() - begin)
    rate = max(1, total // PIECE) * PIECE / best
    return {"gbs": rate / 1e9, "ms": 1e3 * total / rate, "gib": total / 2**30}


@torch.inference_mode()
def check(model: Any, ids: Tensor) -> dict[str, float]:
    """Relative errors of logits behind a prompt and of steps, from those over keys on the GPU.

    Raises:
        RuntimeError: an error that the order of sums does not explain.
    """
    found: list[list[Tensor]] = []
    for params in (HOST, {}):
        with saccade.Context(model, ContextParams(n_batch=512, **params)) as ctx:
            logits = [ctx.logits(ctx.append(ids)[-1])]
            step = DecodeStep(ctx.model, ctx.cache)
            logits += [step(token)[0].clone() for token in range(5, 305)]
            found.append([*logits, ctx.logits(ctx.append(ids[:9])[-1])])
    errors = [relative(a, b) for a, b in zip(*found, strict=True)]
    result = {"prompt": errors[0], "steps": max(errors[1:-1]), "behind": errors[-1]}
    if not max(errors) < LIMIT:
        raise RuntimeError(f"other logits over host memory: {result}; nothing is timed.")
    return result


@torch.no_grad()
def generate_row(
    model: Any, ids: Tensor, params: dict[str, Any] | None, **options: Any
) -> dict[str, float]:
    """`generate()`, attached under `params`, or as it is (None) with `options`."""
    attached = nullcontext() if params is None else saccade.attach(model, ContextParams(**params))
    clock, count = Clock(), FEW + MANY

    def run() -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )  # fmt: skip

    with attached:
        times = clock.run(run)
    return _row(times)


def context_row(model: Any, ids: Tensor, count: int = MANY, **params: Any) -> dict[str, float]:
    """A Context, its memory reserved; `count` tokens are timed."""
    reserve = ids.shape[1] + FEW + count + 8
    with saccade.Context(model, ContextParams(n_batch=4096, **params), reserve=reserve) as ctx:
        synchronize()
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in ctx.stream(ids[0].cpu(), n_predict=FEW + count)]
    return _row(times)


def _row(times: list[float]) -> dict[str, float]:
    steps = [b - a for a, b in pairwise(times)][1 + FEW :]
    return {
        "first_s": times[1] - times[0],
        "token_ms": 1e3 * median(steps),
        "mean_ms": 1e3 * mean(steps),
        "peak_gib": peak(),
    }


def rows(model: Any, ids: Tensor) -> dict[str, Callable[[], dict[str, float]]]:
    """What is measured for a prompt `[1, n]`, the most important first."""
    return {
        "Context": lambda: context_row(model, ids, TURN, **HOST),
        "attach": lambda: generate_row(model, ids, HOST),
        "transformers, offloaded": lambda: generate_row(
            model, ids, None, cache_implementation="offloaded"
        ),
        "Context, strided": lambda: context_row(model, ids, sparse=SPARSE, **HOST),
        "Context, keys on the GPU": lambda: context_row(model, ids),
    }


def measured(row: Callable[[], dict[str, float]], needed_ms: float) -> dict[str, Any]:
    """A row with its ratio to what the link needs, or why there is none."""
    peak()
    try:
        found: dict[str, Any] = row()
    except Exception as error:  # one row less, and the record says why
        return {"failed": str(error)[:300]}
    return found | {"of_link": found["token_ms"] / needed_ms}


def main() -> None:
    """Measure and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="begin no row after that time")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    config = LlamaConfig(**(SHAPE | TINY if args.tiny else SHAPE))
    model = random_model(config, "sdpa")
    record: dict[str, Any] = {"schema": SCHEMA, **origin(), "shape": "Llama-3.1-8B"}
    record["errors"] = check(model, tokens(300 if args.tiny else 2000, config.vocab_size))
    put(args.out, record)
    for length in (96,) if args.tiny else LENGTHS:
        ids = tokens(length, config.vocab_size)[None].to(DEVICE)
        needed = link(key_bytes(config, length))
        name = f"{length:,} tokens"
        record[name] = {"link": needed}
        for row, run in rows(model, ids).items():
            late = time.monotonic() > deadline
            record[name][row] = {"left_out": "no time"} if late else measured(run, needed["ms"])
            put(args.out, record)


if __name__ == "__main__":
    main()
