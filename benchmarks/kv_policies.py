"""What each KV policy keeps of a text's meaning, and how fast decoding is over what it kept.

    python -m benchmarks.kv_policies --out benchmarks/results/kv-policies.json

The context is read and compressed before anything is known of what follows (query-agnostic).  Then
a continuation is scored against the predictions over all keys, and the questions for the needles
are asked, which `dense` has to answer too.  Decoding is timed in turns in one process and thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade.compress import POLICIES
from saccade.evals.needle import Question, answered, hide, make_needles, questions
from saccade.evals.text import default_text
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime.compression import compress_cache

BUDGETS = (0.5, 0.25, 0.1, 48)
"""Shares of the context, and a number of keys below every observation window."""
TURNS, STEPS = 12, 8


def texts(model: Any, length: int, scored: int) -> tuple[Tensor, Tensor, list[Question]]:
    """The context with needles in it, the tokens behind it, and the questions."""

    def encode(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    needles, tokens = make_needles(12), encode(default_text())
    context = hide(tokens, needles, encode, length)
    read = length - sum(len(encode(needle.sentence)) for needle in needles)
    asked = questions(needles, encode)
    return torch.tensor(context), torch.tensor(tokens[read : read + scored]), asked


def outcome(ctx: saccade.Context, continuation: Tensor, asked: list[Question]) -> dict[str, Any]:
    """Log-probabilities `[m, vocab]` of the continuation, and how many needles are found."""
    length, size = ctx.seen, ctx.cache_bytes
    hidden = ctx.append(continuation, wanted=len(continuation))
    log_probs = ctx.logits(hidden).log_softmax(-1)
    ctx.reuse(torch.tensor([*ctx.tokens[:length], 0]))
    flat = torch.tensor([token for question in asked for token in question.tokens])
    best = ctx.logits(ctx.append(flat, wanted=len(flat))).argmax(-1)
    ctx.reuse(torch.tensor([*ctx.tokens[:length], 0]))
    return {"log_probs": log_probs, "bytes": size, "needles": sum(answered(asked, best))}


def quality(model: Any, length: int, scored: int) -> list[dict[str, Any]]:
    """Rows of all policies and budgets, the dense one first."""
    context, continuation, asked = texts(model, length, scored)
    params = saccade.ContextParams(n_ctx=length + 1024)
    with saccade.Context(model.model, params) as ctx:
        ctx.append(context)
        exact = outcome(ctx, continuation, asked)
    shared = {"tokens": length, "asked": len(asked)}
    rows = [{"policy": "dense", "needles": exact["needles"], "bytes": exact["bytes"], **shared}]
    for name in POLICIES:
        rows += _rows_of(model, name, context, continuation, asked, exact, shared)
    return rows


def _rows_of(
    model: Any,
    name: str,
    context: Tensor,
    continuation: Tensor,
    asked: list[Question],
    exact: dict[str, Any],
    shared: dict[str, Any],
) -> list[dict[str, Any]]:
    """One policy under every budget; the context is read once and its caches are put back."""
    rows: list[dict[str, Any]] = []
    params = saccade.ContextParams(n_ctx=len(context) + 1024, kv_policy=name, kv_budget=0.5)
    with saccade.Context(model.model, params) as ctx:
        start = time.process_time()
        ctx.append(context)
        read, held, window = time.process_time() - start, ctx.text.held, ctx.observation_window
        assert window is not None
        states, observed = [store.state() for store in ctx.cache.stores], window.state()
        for budget in BUDGETS:
            for store, state in zip(ctx.cache.stores, states, strict=True):
                store.restore(state, torch.device("cpu"))
            ctx.text.restore(held._replace(observed=observed))
            window, start = ctx.observation_window, time.process_time()
            assert window is not None
            with torch.inference_mode():
                compress_cache(ctx.cache, window, budget)
            spent = time.process_time() - start
            ctx.text.restore(held._replace(observed=None, compressed_at=ctx.cache.seen))
            found = outcome(ctx, continuation, asked)
            gap = (exact["log_probs"].exp() * (exact["log_probs"] - found["log_probs"])).sum(-1)
            same = found["log_probs"].argmax(-1) == exact["log_probs"].argmax(-1)
            row = {"policy": name, "budget": budget, "needles": found["needles"], **shared}
            row |= {"bytes": found["bytes"], "kl": float(gap.mean())}
            row |= {
                "kl_se": float(gap.std() / len(gap) ** 0.5),
                "same_top": float(same.float().mean()),
            }
            rows.append({**row, "read_seconds": read, "policy_seconds": spent})
            print(row, flush=True)
    return rows


def decoding(model: Any, length: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time for a token of each kind of cache, in turns."""
    tokens = model.tokenizer(default_text(), add_special_tokens=False).input_ids[:length]
    options: dict[str, dict[str, Any]] = {
        "dense": {},
        "snapkv": {"kv_policy": "snapkv", "kv_budget": 0.25},
        "ada_snapkv": {"kv_policy": "ada_snapkv", "kv_budget": 0.25},
    }
    streams, rows, spent = {}, {}, {name: list[float]() for name in options}
    for name, each in options.items():
        ctx = saccade.Context(model.model, saccade.ContextParams(n_ctx=length + 1024, **each))
        streams[name] = ctx.stream(tokens, n_predict=TURNS * STEPS + 2)
        for _ in range(2):
            next(streams[name])
        rows[name] = {"cache": name, "tokens": length, "bytes": ctx.cache_bytes}
    for _ in range(TURNS):
        for name, stream in streams.items():
            for _ in range(STEPS):
                start = time.process_time()
                next(stream)
                spent[name].append(time.process_time() - start)
    found = [{**rows[n], "ms": 1e3 * statistics.median(times)} for n, times in spent.items()]
    print(found, flush=True)
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=1536, help="tokens of the context")
    parser.add_argument("--scored", type=int, default=256, help="tokens scored behind it")
    parser.add_argument("--decode-at", type=int, default=7168, help="tokens before decoding")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = saccade.load_model("smollm2")
    record = {
        "schema": "saccade.kv-policies/1",
        "model": model.name,
        **origin(),
        "scored": args.scored,
        "decode": decoding(model, args.decode_at),
        "rows": quality(model, args.context, args.scored),
    }
    write_whole(args.out, as_text(record))


if __name__ == "__main__":
    main()
