"""Sparse beside dense attention on a GPU: operator, selection, long prompts in chunks, decoding.

    python -m benchmarks.gpu_sparse --seconds 180 --out sparse_h200.json

Llama-3.1-8B's heads, 32 queries on 8 KV heads of 128, bfloat16.  Queries and keys have structure:
each segment of a text has a topic, and a query resembles the topic of one earlier segment.  Each
sparse result is gated on its LSE, which never exceeds that of dense attention; recall is
exp(LSE of the selection - LSE of all keys).  Dense and sparse calls run in turns, and medians are
compared.  `--device cpu --keys 2048` runs all of it in small.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attend, make_call
from saccade.ops.selection import summarize
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.sparse import BlockTopK, BlockTopP, Quest, RulePattern

HEADS, KV_HEADS, DIM, SEGMENT, READ = 32, 8, 128, 512, 2048
DENSITIES = (0.10, 0.25, 0.50)
Work = Callable[[], object]
Row = dict[str, Any]


def inputs(keys: int, q_len: int, device: str) -> tuple[Tensor, DenseKV]:
    """Queries at the end of keys, each near the topic of a segment; reproducible."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    segments = -(-keys // SEGMENT)
    topics = normal(1, KV_HEADS, segments, DIM)
    k = topics.repeat_interleave(SEGMENT, 2)[:, :, :keys] + normal(1, KV_HEADS, keys, DIM)
    asked = torch.randint(segments, (q_len // 128 + 1,), generator=generator, device=device)
    q = topics[:, :, asked].repeat_interleave(128, 2)[:, :, :q_len]
    q = q.repeat_interleave(HEADS // KV_HEADS, 1) + normal(1, HEADS, q_len, DIM)
    v = normal(1, KV_HEADS, keys, DIM)
    return q.bfloat16().contiguous(), DenseKV(k.bfloat16(), v.bfloat16())


def medians(works: Mapping[str, Work], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, called in turns, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, taken.values())) < 3:
        for name, work in works.items():
            _wait()
            begin = time.perf_counter()
            work()
            _wait()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(each) for name, each in taken.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def recall(q: Tensor, kv: DenseKV, blocks: BlockSelection) -> float:
    """The share of the attention's weight on selected keys; fails where it exceeds 1."""
    sparse, whole = (attend(make_call(q, kv, mask=Mask(), blocks=b)).lse for b in (blocks, None))
    excess = float((sparse - whole).max())
    assert excess < 0.02, f"the LSE over some keys exceeds that over all by {excess:.3g}"
    return float((sparse - whole).exp().mean())


def operator_rows(keys: int, device: str, seconds: float) -> Iterator[Row]:
    """Random blocks under a chunk of queries: time by the dense time, and by that of the pairs."""
    chunk = keys // 8
    q, kv = inputs(keys, chunk, device)
    dense = make_call(q, kv, mask=Mask())
    works: dict[str, Work] = {"dense": lambda: attend(dense)}
    pairs: dict[str, float] = {}
    at = torch.arange(keys, device=device)
    seen = at <= at[-chunk:, None]
    for block in (64, 128):
        for density in DENSITIES:
            allowed = (
                torch.rand(1, KV_HEADS, chunk // block, keys // block, device=device) < density
            )
            allowed[..., 0] = True
            blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
            recall(q, kv, blocks)
            call, name = make_call(q, kv, mask=Mask(), blocks=blocks), f"{block} {density:.0%}"
            wide = allowed[0, 0].repeat_interleave(block, 0).repeat_interleave(block, 1)
            pairs[name] = float((wide & seen).sum() / seen.sum())
            works[name] = lambda call=call: attend(call)
    found = medians(works, seconds)
    by_pairs = {name: found[name] / found["dense"] / share for name, share in pairs.items()}
    yield {"part": "operator", "keys": keys, "queries": chunk, "ms": found, "by_pairs": by_pairs}


def patterns(keys: int) -> dict[str, RulePattern]:
    """What is compared, with blocks of 128 that all kernels take."""
    top = max(1, keys // 128 // 8)
    return {
        "block top-k": BlockTopK(block=128, top=top, window_blocks=2),
        "block top-p": BlockTopP(block=128, p=0.95, window_blocks=2),
        "quest": Quest(block=128, top=top),
    }


def step_rows(keys: int, device: str, seconds: float) -> Iterator[Row]:
    """Selecting and attending apart, over kept summaries: a prompt's chunk, and one token."""
    few = {
        "block top-k": BlockTopK(block=64, top=READ // 64 - 5),
        "quest": Quest(block=32, top=READ // 32 - 3),
    }
    for q_len, each in ((min(8192, keys // 4), patterns(keys)), (1, few)):
        q, kv = inputs(keys, q_len, device)
        dense = make_call(q, kv, mask=Mask())
        for name, pattern in each.items():
            rows = summarize(kv.k, pattern.rule.k_block, pattern.rule.summary)
            blocks = pattern.select(q, kv, keys - q_len, rows)
            kept, density = recall(q, kv, blocks), float(blocks.allowed.float().mean())
            call = make_call(q, kv, mask=Mask(), blocks=blocks)
            works: dict[str, Work] = {
                "dense": lambda call=dense: attend(call),
                "select": partial(pattern.select, q, kv, keys - q_len, rows),
                "attend": lambda call=call: attend(call),
            }
            yield {
                "part": "prefill" if q_len > 1 else "decode", "keys": keys, "queries": q_len,
                "pattern": str(pattern), "name": name, "recall": kept, "selected": density,
                "ms": medians(works, seconds),
            }  # fmt: skip


def prompt_rows(keys: int, device: str) -> Iterator[Row]:
    """A whole prompt in chunks of 8k, one layer: dense, and each pattern with its selection."""
    chunk = min(8192, keys // 8)
    q, kv = inputs(keys, keys, device)
    totals = dict.fromkeys(("dense", *patterns(keys)), 0.0)
    kept: dict[str, list[float]] = {name: [] for name in patterns(keys)}
    for start in range(0, keys, chunk):
        part, view = q[:, :, start : start + chunk].contiguous(), kv_until(kv, start + chunk)
        dense = make_call(part, view, mask=Mask())
        works: dict[str, Work] = {"dense": lambda call=dense: attend(call)}
        for name, pattern in patterns(keys).items():
            rows = summarize(view.k, pattern.rule.k_block, pattern.rule.summary)
            kept[name].append(recall(part, view, pattern.select(part, view, start, rows)))

            def sparse(p=pattern, q=part, kv=view, at=start, rows=rows) -> object:
                return attend(make_call(q, kv, mask=Mask(), blocks=p.select(q, kv, at, rows)))

            works[name] = sparse
        for name, ms in medians(works, 0.0).items():
            totals[name] += ms
    recalls = {name: statistics.mean(each) for name, each in kept.items()}
    yield {"part": "prompt", "keys": keys, "queries": chunk, "ms": totals, "recall": recalls}


def kv_until(kv: DenseKV, stop: int) -> DenseKV:
    """The first keys."""
    return DenseKV(kv.k[:, :, :stop], kv.v[:, :, :stop])


def main() -> None:
    """Measure part after part until the time is over; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="for everything")
    parser.add_argument("--keys", type=int, default=32_768)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    begin, rows, long = time.perf_counter(), list[Row](), given.keys * 4
    each = given.seconds / 60
    parts: list[Callable[[], Iterator[Row]]] = [
        lambda: operator_rows(given.keys, given.device, each),
        lambda: step_rows(given.keys, given.device, each),
        lambda: step_rows(long, given.device, each),
        lambda: prompt_rows(given.keys, given.device),
        lambda: prompt_rows(long, given.device),
    ]
    for part in parts:
        if time.perf_counter() - begin > given.seconds * 0.75:
            rows.append({"part": "left out", "why": f"{given.seconds:g} s were over"})
            break
        for row in part():
            print(row, flush=True)
            rows.append(row)
            write_whole(given.out, as_text({**origin(), "rows": rows}))


if __name__ == "__main__":
    main()
