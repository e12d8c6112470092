"""Llama-3.1-8B's shape with random weights on one GPU: prompts and steps under sparse patterns.

    python -m benchmarks.gpu_sparse_model --out benchmarks/results/h200_sparse_model.json

Prompts of 32k and 128k tokens are read in chunks, densely and under each pattern.  Behind the
longest, steps are captured graphs over dense keys and over 2k of them.  Before anything is timed,
a pattern that selects all blocks has to give the dense logits of the same kernels.  Weights and
tokens are random, so that the record says nothing about quality.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import saccade
from benchmarks.gpu_models import (
    CHUNK,
    LONG,
    SCHEMA,
    SHAPE,
    TINY,
    Ours,
    put,
    rate,
    relative,
    timed,
    tokens,
)
from benchmarks.gpu_sparse import few
from saccade.report.record import origin
from saccade.sparse import BlockTopK, BlockTopP, RulePattern, Strided

LIMIT = 2e-2  # of the norm of logits: other kernels in bfloat16
EVERYTHING = BlockTopK(block=64, top=1 << 20)


def prompt_patterns(keys: int) -> dict[str, RulePattern]:
    """Patterns for prompts: an eighth of the keys, or a share of the attention."""
    return {
        "block top-p": BlockTopP(block=128, p=0.95, window_blocks=2),
        "block top-k": BlockTopK(block=128, top=max(1, keys // 128 // 8), window_blocks=2),
        "strided": Strided(block=128, window_blocks=8, stride=8),
    }


def over_copy(dense: Ours, pattern: RulePattern | None, **kind: Any) -> dict[str, Any]:
    """Steps over a copy of the caches of `dense`, and their logits for token 7."""
    length, kept = dense.ctx.seen, (dense.ctx, dense.decode)
    params = saccade.ContextParams(n_ctx=dense.room, sparse=pattern, **kind)
    ctx = saccade.Context(dense.model, params, reserve=dense.room)
    with torch.inference_mode():
        for ours, theirs in zip(ctx.cache.stores, dense.ctx.cache.stores, strict=True):
            view = theirs.view()
            ours.append(view.k[:, :, :length], view.v[:, :, :length])
    dense.ctx, dense.decode = ctx, None
    logits = dense.step(7).clone()
    found = rate(dense) | {"captures": dense.decode.captures, "logits": logits}
    ctx.close()
    dense.ctx, dense.decode = kept
    return found


def read(subject: Ours, ids: torch.Tensor, chunk: int) -> float:
    """Seconds to the logits behind a prompt, into emptied caches."""
    subject.forget()
    return timed(lambda: subject.read(ids, chunk))


def first_token(
    subject: Ours, pattern: RulePattern, ids: torch.Tensor, chunk: int
) -> dict[str, Any]:
    """Seconds to the first token behind a prompt whose blocks a pattern selects."""
    subject.ctx.close()
    subject.params = {"sparse": pattern}
    subject.context(chunk)
    read(subject, ids, chunk)  # compile: kernels differ by the number of blocks
    return {"first_token_s": read(subject, ids, chunk), "pattern": str(pattern)}


def main() -> None:
    """Measure; the record is written after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no part after that")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    given = parser.parse_args()
    config = LlamaConfig(**{**SHAPE, **(TINY if given.tiny else {})})
    lengths = (600, 1200) if given.tiny else (32768, LONG - 256)
    chunk, begin = 256 if given.tiny else CHUNK, time.perf_counter()
    record: dict[str, Any] = {"schema": SCHEMA, **origin(), "lengths": lengths}
    ids, subject = tokens(lengths[-1], config.vocab_size), Ours(config, lengths[-1] + 256)
    read(subject, ids, chunk)  # compile
    record["dense"] = {str(n): {"first_token_s": read(subject, ids[:n], chunk)} for n in lengths}
    put(given.out, record)
    steps = {"dense": over_copy(subject, None)}
    reads_blocks = {} if given.tiny else {"backend": "triton"}
    same = over_copy(subject, None, **reads_blocks)["logits"]
    error = relative(over_copy(subject, EVERYTHING)["logits"], same)
    if not error < LIMIT:
        raise RuntimeError(f"all blocks give other logits than dense attention, by {error:.2g}.")
    for name, pattern in few().items():
        steps[name] = over_copy(subject, pattern) | {"pattern": str(pattern)}
    steps["dense int4"] = over_copy(subject, None, type_k="int4", type_v="int4")
    for row in steps.values():
        row.pop("logits")
    record["steps"] = steps | {"error_of_all_blocks": error}
    put(given.out, record)
    for name in prompt_patterns(1):
        if time.perf_counter() - begin > given.seconds:
            break
        record[name] = {
            str(n): first_token(subject, prompt_patterns(n)[name], ids[:n], chunk) for n in lengths
        }
        put(given.out, record)


if __name__ == "__main__":
    main()
