"""`generate()` under `attach` on one GPU against transformers' sdpa and against saccade.Context.

    python -m benchmarks.gpu_generate --out benchmarks/results/h200_generate.json

Llama-3.1-8B's shape, random bf16 weights.  A token's time is the difference of two runs of
`generate()` that write few and many tokens behind the same prompt; a prompt's time is what the
first token takes.  Greedy tokens of saccade and sdpa differ where random weights make two tokens
nearly as likely, so what is checked before anything is timed are logits (`gpu_llama`, part check)
and that captured steps write the tokens that uncaptured ones write.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

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
from saccade.report.record import origin
from saccade.runtime import ContextParams

SCHEMA = "saccade.generate/1"
FEW, MANY = 4, 36
LIMIT = 0.1  # of the norm of logits, in bf16
CASES = [(1, 512), (1, 2048), (8, 2048), (1, 16384)]
ROWS: dict[str, dict[str, Any] | None] = {
    "sdpa": None,
    "attach": {},
    "attach, int8": {"type_k": "int8", "type_v": "int8"},
    "attach, window": {"n_swa": 1024, "n_sinks": 4},
    "attach, SnapKV 25 %": {"kv_policy": "snapkv"},
}


def written(
    model: Any,
    params: dict[str, Any] | None,
    ids: Tensor,
    count: int,
    *,
    logits: bool = False,
) -> tuple[Tensor, Any]:
    """Tokens, and if asked for logits, that `generate()` writes behind a prompt `[B, n]`."""
    attached = nullcontext()
    if params is not None:
        if "kv_policy" in params:
            params = params | {"kv_budget": ids.shape[1] // 4}
        attached = saccade.attach(model, ContextParams(**params))
    with attached, torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, output_logits=logits,
            return_dict_in_generate=True,
        )  # fmt: skip
    return found.sequences[:, ids.shape[1] :], found.logits


def row(model: Any, params: dict[str, Any] | None, ids: Tensor) -> dict[str, float]:
    """Milliseconds of a token, and of the first one, the best of three."""
    written(model, params, ids, FEW)
    first = min(timed(lambda: written(model, params, ids, 1)) for _ in range(3))
    few = min(timed(lambda: written(model, params, ids, FEW)) for _ in range(3))
    many = min(timed(lambda: written(model, params, ids, MANY)) for _ in range(2))
    return {"first_ms": 1e3 * first, "token_ms": 1e3 * (many - few) / (MANY - FEW)}


def context_row(model: Any, ids: Tensor) -> dict[str, float]:
    """Milliseconds of a token in a Context, which has one row."""
    with saccade.Context(model, ContextParams(n_batch=2048)) as ctx:
        last = ids[0, -1:].cpu()
        first = timed(lambda: ctx.logits(ctx.append(ids[0].cpu())[-1:]))
        list(ctx.stream(last, n_predict=FEW))
        seconds = timed(lambda: list(ctx.stream(last, n_predict=MANY)))
    return {"first_ms": 1e3 * first, "token_ms": 1e3 * seconds / MANY}


def check(model: Any, ids: Tensor) -> dict[str, float]:
    """Relative errors of logits of captured steps, from the same run without them.

    Raises:
        RuntimeError: an error that rounding to bf16 does not explain.
    """
    errors: dict[str, float] = {}
    for name, params in ROWS.items():
        if params is None:
            continue
        plain = written(model, params | {"fused_layers": False}, ids, 3, logits=True)
        ours = written(model, params, ids, 3, logits=True)
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
