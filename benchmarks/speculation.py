"""Exact speculation on a CPU: its speed beside dense decoding, and accepted lengths.

    python -m benchmarks.speculation --model smollm2 --json out/speculation.json

One context reads the text, the others get copies of its caches, and all write behind it in turns in
one process, greedily and sampled.  Medians of processor seconds are compared.  Texts are compared
with the dense one token by token: kernels round several tokens otherwise than one, so a text may
part from the dense one, and a row says where and how near the two best logits were there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import saccade
from saccade.evals.text import default_text
from saccade.hf.context import as_model
from saccade.hf.load import LoadedModel, load_model
from saccade.report.environment import cpu_name
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime import Context, ContextParams, Sampler, Stats
from saccade.runtime.auto_scaling import reaching
from saccade.sparse import BlockTopK, Pattern, Quest

READ = 2048
PATTERNS: dict[str, Pattern] = {
    "BlockTopK": BlockTopK(top=READ // 64 - 5),
    "Quest": Quest(block=32, top=READ // 32 - 3),
}
DRAFTS = (4, 8)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 0},
}
Row = dict[str, Any]


class Written(NamedTuple):
    """One text."""

    tokens: list[int]
    seconds: float
    stats: Stats


def write(ctx: Context, prompt: list[int], n_predict: int, sampling: dict[str, Any]) -> Written:
    """Write behind a prompt, all of which but its last token is in the context."""
    start = ctx.reuse(prompt)
    ctx.stats = Stats()
    stream = ctx.stream(prompt[start:], n_predict=n_predict, sampler=Sampler(**sampling))
    tokens = [next(stream).token]
    begin = time.process_time()
    tokens += [each.token for each in stream]
    return Written(tokens, time.process_time() - begin, ctx.stats)


def margin(ctx: Context, tokens: list[int]) -> float:
    """Distance of the two largest logits behind a text."""
    start = ctx.reuse(tokens)
    best = ctx.logits(ctx.append(tokens[start:]))[-1].topk(2).values
    return float(best[0] - best[1])


def copy(source: Context, target: Context) -> None:
    """Give a context what another one has read."""
    if source is target:
        return
    with torch.inference_mode():
        for ours, theirs in zip(target.cache.stores, source.cache.stores, strict=True):
            ours.restore(theirs.state(), source.model.device)
    target.cache.reaches = source.cache.reaches
    target.text.restore(source.text.held._replace(tokens=source.tokens))


def params_for(model: LoadedModel, tokens: int) -> ContextParams:
    """Options that reach so many tokens: YaRN beyond the trained length."""
    return reaching(ContextParams(), as_model(model).facts, tokens)[0]


def rows(
    model: LoadedModel, prompt: list[int], n_predict: int, rounds: int, base: ContextParams
) -> Iterator[Row]:
    """One row for each sampling, pattern and number of drafted tokens."""
    with ExitStack() as stack:
        reserve = len(prompt) + n_predict + 64
        dense = stack.enter_context(saccade.Context(model, base, reserve=reserve))
        contexts = {"dense": dense}
        for name, pattern in PATTERNS.items():
            for count in DRAFTS:
                params = replace(base, sparse=pattern, n_draft=count)
                ctx = saccade.Context(model, params, reserve=reserve)
                contexts[f"{name}, {count} drafted"] = stack.enter_context(ctx)
        dense.append(prompt[:-1])
        for ctx in contexts.values():
            copy(dense, ctx)
        for name, sampling in SAMPLINGS.items():
            found: dict[str, list[Written]] = {each: [] for each in contexts}
            for _ in range(rounds):
                for each, ctx in contexts.items():
                    found[each].append(write(ctx, prompt, n_predict, sampling))
            yield from _compared(f"{len(prompt):,}, {name}", found, dense, prompt)


def _compared(
    label: str, found: dict[str, list[Written]], dense: Context, prompt: list[int]
) -> Iterator[Row]:
    expected = found["dense"][0].tokens
    usual = statistics.median(each.seconds for each in found["dense"])
    for name, texts in found.items():
        seconds = statistics.median(each.seconds for each in texts)
        tokens, stats = texts[0].tokens, texts[0].stats
        same = next(
            (i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1),
            len(expected),
        )
        parted = None if same == len(expected) else margin(dense, [*prompt, *expected[:same]])
        yield {
            "name": f"{label}, {name}",
            "tokens": len(tokens),
            "tokens_per_second": (len(tokens) - 1) / seconds,
            "speed": usual / seconds,
            "same_tokens": same,
            "margin_where_parted": parted,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "accepted_length": stats.accepted_length,
        }


def steps(model: LoadedModel, length: int, rounds: int, base: ContextParams) -> Row:
    """Milliseconds of one dense step, of a drafting one, and of the dense one of several tokens."""
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack, torch.inference_mode():
        for name, pattern in PATTERNS.items():
            params = replace(base, sparse=pattern, n_draft=max(DRAFTS))
            attached = stack.enter_context(as_model(model).attached(params))
            cache = attached.new_cache(params, reserve=length + 64)
            facts = attached.facts
            shape = 2, 1, facts.num_kv_heads, length, facts.head_dim
            for store in cache.stores:
                store.append(*torch.randn(shape).to(facts.dtype))
            counts = (1, *(n + 1 for n in DRAFTS)) if not taken else ()
            works = {"a dense step": (1, attached.hidden)} if counts else {}
            works |= {f"{n} tokens at once": (n, attached.hidden) for n in counts[1:]}
            works[f"a step of {name}"] = 1, attached.drafted
            for _ in range(rounds):
                for each, (count, call) in works.items():
                    begin = time.process_time()
                    attached.logits(call(torch.full((1, count), 17), cache)[0])
                    taken.setdefault(each, []).append(time.process_time() - begin)
                    for store in cache.stores:
                        store.truncate(length)
    medians = {name: 1e3 * statistics.median(each) for name, each in taken.items()}
    return {"name": f"milliseconds behind {length:,} tokens", "ms": medians}


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", default="8000,16000", help="tokens of the text")
    parser.add_argument("--n-predict", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, found = load_model(given.model), list[Row]()
    print(f"{cpu_name()}, {given.threads} thread(s), {given.model}")
    assert model.tokenizer is not None
    for length in map(int, given.lengths.split(",")):
        prompt = model.tokenizer(default_text()[: 8 * length])["input_ids"][:length]
        base = params_for(model, length + given.n_predict)
        found.append(steps(model, length, 4 * given.rounds, base))
        print(found[-1], flush=True)
        for row in rows(model, prompt, given.n_predict, given.rounds, base):
            print(row, flush=True)
            found.append(row)
    if given.json:
        record = {**origin(), "model": given.model, "rows": found}
        write_whole(given.json, as_text(record))


if __name__ == "__main__":
    main()
