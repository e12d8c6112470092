"""`generate()` under `attach` on one GPU against transformers' sdpa and against saccade.Context.

    python -m benchmarks.gpu_generate --out benchmarks/results/h200_generate.json

Llama-3.1-8B's shape, random bf16 weights.  A token's time is the median from one
call of a stopping criterion to the next, in one run of `generate()`; a prompt's is that of the
first call.  Greedy tokens of saccade and sdpa differ where random weights make two tokens
nearly as likely, so what is checked before anything is timed are logits (`gpu_llama`, part check)
and that captured steps write the tokens that uncaptured ones write.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, StoppingCriteria, StoppingCriteriaList

import saccade
from benchmarks.gpu_models import (
    DEVICE,
    SHAPE,
    TINY,
    put,
    random_model,
    relative,
    timed,
    tokens,
)
from saccade.bench.gpu import synchronize
from saccade.report.record import origin
from saccade.runtime import ContextParams

SCHEMA = "saccade.generate/1"
FEW, MANY = 4, 36
LIMIT = 0.1  # of the norm of logits, in bf16
CASES = [(1, 512), (1, 2048), (8, 2048), (1, 16384), (8, 16384)]
ROWS: dict[str, dict[str, Any] | None] = {
    "sdpa": None,
    "attach": {},
    "attach, int8": {"type_k": "int8", "type_v": "int8"},
    "attach, window": {"n_swa": 1024, "n_sinks": 4},
    "attach, SnapKV 25 %": {"kv_policy": "snapkv"},
}


class Clock(StoppingCriteria):
    """Notes when each token is there, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See StoppingCriteria."""
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(self, work: Callable[[], object]) -> list[float]:
        """When a run began, and when each of its tokens was there."""
        synchronize()
        self.times = [time.perf_counter()]
        work()
        return self.times


def attached(model: Any, params: dict[str, Any] | None, length: int) -> AbstractContextManager[Any]:
    """The model under these params, for prompts of `length` tokens; None: as it is."""
    if params is None:
        return nullcontext()
    if "kv_policy" in params:
        params = params | {"kv_budget": length // 4}
    return saccade.attach(model, ContextParams(**params))


@torch.no_grad()
def written(
    model: Any, ids: Tensor, count: int, *, logits: bool = False, clock: Clock | None = None
) -> tuple[Tensor, Any]:
    """Tokens, and if asked for logits, that `generate()` writes behind a prompt `[B, n]`."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, pad_token_id=0, output_logits=logits, return_dict_in_generate=True,
        stopping_criteria=None if clock is None else StoppingCriteriaList([clock]),
    )  # fmt: skip
    return found.sequences[:, ids.shape[1] :], found.logits


def row(model: Any, params: dict[str, Any] | None, ids: Tensor) -> dict[str, float]:
    """Milliseconds of a token, and of the first one, the faster of two runs."""
    clock = Clock()
    with attached(model, params, ids.shape[1]):
        written(model, ids, FEW)
        runs = [clock.run(lambda: written(model, ids, MANY, clock=clock)) for _ in range(2)]
    steps = [[b - a for a, b in pairwise(times)][FEW:] for times in runs]
    return {
        "first_ms": 1e3 * min(times[1] - times[0] for times in runs),
        "token_ms": 1e3 * min(map(median, steps)),
    }


def context_row(model: Any, ids: Tensor) -> dict[str, float]:
    """Milliseconds of a token in a Context, which has one row."""
    with saccade.Context(model, ContextParams(n_batch=2048)) as ctx:
        last = ids[0, -1:].cpu()
        first = timed(lambda: ctx.logits(ctx.append(ids[0].cpu())[-1:]))
        times = [time.perf_counter() for _ in ctx.stream(last, n_predict=FEW + MANY)]
    steps = [b - a for a, b in pairwise(times)][FEW:]
    return {"first_ms": 1e3 * first, "token_ms": 1e3 * median(steps)}


def check(model: Any, ids: Tensor) -> dict[str, float]:
    """Relative errors of logits of captured steps, from the same run without them.

    Raises:
        RuntimeError: an error that rounding to bf16 does not explain.
    """
    errors: dict[str, float] = {}
    for name, params in ROWS.items():
        if params is None:
            continue
        runs: list[tuple[Tensor, Any]] = []
        for extra in ({"fused_layers": False}, {}):
            with attached(model, params | extra, ids.shape[1]):
                runs.append(written(model, ids, 3, logits=True))
        plain, ours = runs
        # The first step behind a prompt that is compressed is the model's own.
        at = 1 + ("kv_policy" in params and bool((plain[0] == ours[0])[0, :2].all()))
        errors[name] = relative(ours[1][at], plain[1][at])
        print(f"{name}: relative error {errors[name]:.1e}", flush=True)
        if not errors[name] < LIMIT:
            raise RuntimeError(f"{name}: other logits; nothing is timed.")
    return errors


def main() -> None:
    """Measure and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    args = parser.parse_args()
    config = LlamaConfig(**(SHAPE | TINY if args.tiny else SHAPE))
    model = random_model(config, "sdpa")
    record: dict[str, Any] = {"schema": SCHEMA, **origin(), "shape": "Llama-3.1-8B"}
    record["errors"] = check(model, tokens(300, config.vocab_size)[None].to(DEVICE))
    for batch, length in [(2, 64)] if args.tiny else CASES:
        ids = tokens(batch * length, config.vocab_size).view(batch, length).to(DEVICE)
        found = {name: row(model, params, ids) for name, params in ROWS.items()}
        if batch == 1:
            found["Context"] = context_row(model, ids)
        record[f"batch {batch}, {length:,} tokens"] = found
        put(args.out, record)


if __name__ == "__main__":
    main()
