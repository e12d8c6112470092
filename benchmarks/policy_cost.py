"""What a KV policy adds to the time of reading a prompt, compression included.

    python -m benchmarks.policy_cost --out benchmarks/results/policy-cost.json

A prompt is read without a policy and with each, in turns in one process on one thread; `share` is
the median over turns of what a policy took beyond the reading without one just before, as a share
of that.  Budget: half of the keys.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade.compress import POLICIES
from saccade.evals.text import default_text
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin


def seconds(model: Any, tokens: list[int], policy: str | None) -> float:
    """Processor time until the first token behind the prompt."""
    kept = {} if policy is None else {"kv_policy": policy, "kv_budget": 0.5}
    params = saccade.ContextParams(n_ctx=len(tokens) + 1024, **kept)
    with saccade.Context(model.model, params) as ctx:
        stream, start = ctx.stream(tokens, n_predict=2), time.process_time()
        next(stream)
        return time.process_time() - start


def costs(model: Any, length: int, policies: list[str], turns: int) -> list[dict[str, Any]]:
    """One row a policy; each is timed right behind a reading without one."""
    tokens = model.tokenizer(default_text(), add_special_tokens=False).input_ids[:length]
    seconds(model, tokens[:256], None)
    rows = []
    for name in policies:
        pairs = [(seconds(model, tokens, None), seconds(model, tokens, name)) for _ in range(turns)]
        share = statistics.median(spent / dense - 1 for dense, spent in pairs)
        dense = statistics.median(dense for dense, _ in pairs)
        dtype = str(model.model.dtype).removeprefix("torch.")
        rows.append(
            {"policy": name, "tokens": length, "dtype": dtype, "share": share, "seconds": dense}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype:
        model = saccade.load_model("smollm2", dtype=getattr(torch, dtype))
        for length in args.context:
            rows += costs(model, length, args.policy, args.turns)
    record = {"schema": "saccade.policy-cost/1", "model": model.name, **origin(), "rows": rows}
    write_whole(args.out, as_text(record))


if __name__ == "__main__":
    main()
