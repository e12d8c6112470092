"""Sparse beside dense attention on a GPU: operator, selection, long prompts in chunks, decoding.

    python -m benchmarks.gpu_sparse --seconds 240 --out sparse_h200.json

Llama-3.1-8B's heads, 32 queries on 8 KV heads of 128, bfloat16.  Queries and keys have structure:
each segment of a text has a topic, and a query resembles the topic of a segment that has begun.
Before it is timed, each sparse result is compared with a formula in float64 at its first and last
query, and its LSE never exceeds that of dense attention; recall is exp(LSE of the selection - LSE
of all keys).  Dense and sparse calls run in turns, and medians are compared.  Steps of decoding are
measured eagerly, and captured in one CUDA graph over the caches of several layers, so that none of
them stays in the L2 cache.  `--device cpu --keys 1024` runs all of it in small, graphs excepted.
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

from saccade.bench.gpu import on_gpu, synchronize
from saccade.cache import KeySummaries, QuantizedCache
from saccade.core import BlockSelection, DenseKV, KVView, Mask
from saccade.core.kv import dense
from saccade.ops import AttentionCall, attend, make_call
from saccade.ops.attention import dispatch
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.selection import summarize
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.sparse import BlockTopK, BlockTopP, Quest, RulePattern

HEADS, KV_HEADS, DIM, SEGMENT, READ = 32, 8, 128, 512, 2048
DENSITIES = (0.10, 0.25, 0.50)
LAYERS = 8  # of a captured step
Work = Callable[[], object]
Row = dict[str, Any]


def inputs(keys: int, q_len: int, device: str, seed: int = 0) -> tuple[Tensor, DenseKV]:
    """Queries at the end of keys, each near the topic of a segment; reproducible."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    segments = -(-keys // SEGMENT)
    topics = normal(1, KV_HEADS, segments, DIM)
    k = topics.repeat_interleave(SEGMENT, 2)[:, :, :keys] + normal(1, KV_HEADS, keys, DIM)
    begins = torch.arange(keys - q_len, keys + 1, 128, device=device)  # of 128 queries
    share = torch.rand(len(begins), generator=generator, device=device)
    asked = (share * (begins // SEGMENT + 1).clamp(max=segments)).long()
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
            synchronize()
            begin = time.perf_counter()
            work()
            synchronize()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(each) for name, each in taken.items()}


def backend_of(call: AttentionCall) -> str:
    """The name of the backend that `auto` takes."""
    chosen = dispatch.choose(call, "auto")
    return next(name for name, backend in dispatch.BACKENDS.items() if backend is chosen)


def check(call: AttentionCall) -> None:
    """Fail where a result over selected blocks is not the formula's, at its outer queries."""
    found, blocks = attend(call).out, call.blocks
    assert blocks is not None and isinstance(call.q_offset, int)
    k, v = (x[0].double() for x in given_keys(call.kv))
    at = torch.arange(k.shape[1], device=k.device)
    for i in {0, call.q.shape[2] - 1}:
        seen = blocks.visible(torch.tensor([i], device=k.device), at)[0, :, 0].expand(KV_HEADS, -1)
        seen = seen & (at <= call.q_offset + i)
        for head in (0, HEADS - 1):
            kv_head = head // (HEADS // KV_HEADS)
            scores = k[kv_head] @ call.q[0, head, i].double() * call.scale
            weights = scores.masked_fill(~seen[kv_head], -torch.inf).softmax(0)
            error = float((found[0, head, i].double() - weights @ v[kv_head]).abs().max())
            assert error < 0.02, f"query {i} of head {head} is off by {error:.2g}"


def given_keys(kv: KVView) -> tuple[Tensor, Tensor]:
    """Keys and values of a view, as they were given."""
    tile = dense(kv)
    if kv.hadamard:
        return hadamard_transform(tile.k), hadamard_transform(tile.v)
    return tile.k, tile.v


def recall(q: Tensor, kv: KVView, blocks: BlockSelection, q_offset: int) -> float:
    """The share of the attention's weight on selected keys; fails where a result is wrong."""
    sparse = make_call(q, kv, mask=Mask(), blocks=blocks, q_offset=q_offset)
    check(sparse)
    whole = make_call(q, kv, mask=Mask(), q_offset=q_offset)
    lse, all_keys = attend(sparse).lse, attend(whole).lse
    excess = float((lse - all_keys).max())
    assert excess < 0.02, f"the LSE over some keys exceeds that over all by {excess:.3g}"
    return float((lse - all_keys).exp().mean())


def operator_rows(keys: int, device: str, seconds: float) -> Iterator[Row]:
    """Random blocks under a chunk of queries: time by the dense time, and by that of the pairs."""
    chunk = keys // 8
    q, kv = inputs(keys, chunk, device)
    whole = make_call(q, kv, mask=Mask())
    works: dict[str, Work] = {"dense": lambda: attend(whole)}
    backends, pairs = {"dense": backend_of(whole)}, dict[str, float]()
    at = torch.arange(keys, device=device)
    seen = at <= at[-chunk:, None]
    for block in (64, 128):
        for density in DENSITIES:
            shape = 1, KV_HEADS, chunk // block, keys // block
            allowed = torch.rand(*shape, device=device) < density
            allowed[..., 0] = True
            blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
            recall(q, kv, blocks, keys - chunk)
            call, name = make_call(q, kv, mask=Mask(), blocks=blocks), f"{block} {density:.0%}"
            shares = [_share(grid, block, seen) for grid in allowed[0]]
            pairs[name], backends[name] = statistics.mean(shares), backend_of(call)
            works[name] = lambda call=call: attend(call)
    found = medians(works, seconds)
    by_pairs = {name: found[name] / found["dense"] / share for name, share in pairs.items()}
    yield {
        "part": "operator", "keys": keys, "queries": chunk, "ms": found, "pairs": pairs,
        "by_pairs": by_pairs, "backends": backends,
    }  # fmt: skip


def _share(grid: Tensor, block: int, seen: Tensor) -> float:
    """Share of the visible pairs that one head's grid selects."""
    wide = grid.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return float((wide & seen).sum() / seen.sum())


def patterns(keys: int) -> dict[str, RulePattern]:
    """What is compared for prompts: an eighth of the keys, or a share of the attention."""
    top = max(1, keys // 128 // 8)
    return {
        "block top-k": BlockTopK(block=128, top=top, window_blocks=2),
        "block top-k of 64": BlockTopK(block=64, top=2 * top, window_blocks=4),
        "block top-p": BlockTopP(block=128, p=0.95, window_blocks=2),
        "quest": Quest(block=128, top=top),
    }


def few() -> dict[str, RulePattern]:
    """What is compared for decoding: 2k keys in all."""
    return {
        "block top-k": BlockTopK(block=64, top=READ // 64 - 5),
        "quest": Quest(block=32, top=READ // 32 - 3),
    }


def step_rows(keys: int, device: str, seconds: float) -> Iterator[Row]:
    """Selecting and attending apart, over kept summaries: a prompt's chunk, and one token."""
    for q_len, each in ((min(8192, keys // 4), patterns(keys)), (1, few())):
        q, kv = inputs(keys, q_len, device)
        whole = make_call(q, kv, mask=Mask())
        for name, pattern in each.items():
            rows = summarize(kv.k, pattern.rule.k_block, pattern.rule.summary)
            blocks = pattern.select(q, kv, keys - q_len, rows)
            kept, share = recall(q, kv, blocks, keys - q_len), float(blocks.allowed.float().mean())
            call = make_call(q, kv, mask=Mask(), blocks=blocks)
            works: dict[str, Work] = {
                "dense": lambda call=whole: attend(call),
                "select": partial(pattern.select, q, kv, keys - q_len, rows),
                "attend": lambda call=call: attend(call),
            }
            yield {
                "part": "prefill" if q_len > 1 else "decode", "keys": keys, "queries": q_len,
                "pattern": str(pattern), "name": name, "recall": kept, "selected": share,
                "backends": {"dense": backend_of(whole), "attend": backend_of(call)},
                "ms": medians(works, seconds),
            }  # fmt: skip


def captured_rows(keys: int, storage: str, device: str, seconds: float) -> Iterator[Row]:
    """One token through the attention of LAYERS layers as one CUDA graph, bf16 or int4 keys."""
    layers = [stored(storage, *inputs(keys, 1, device, seed)) for seed in range(LAYERS)]
    works: dict[str, Work] = {"dense": captured(partial(_attend_all, layers, None, None))}
    kept = dict[str, float]()
    for name, pattern in few().items():
        rows = [summaries_of(kv, pattern) for _, kv in layers]
        q, kv = layers[0]
        kept[name] = recall(q, kv, pattern.select(q, kv, keys - 1, rows[0]), keys - 1)
        works[name] = captured(partial(_attend_all, layers, pattern, rows))
        works[f"{name}: select"] = captured(partial(_select_all, layers, pattern, rows))
    found = {name: ms / LAYERS for name, ms in medians(works, seconds).items()}
    yield {
        "part": "captured", "keys": keys, "storage": storage, "layers": LAYERS,
        "graph": on_gpu(), "recall": kept, "ms": found,
    }  # fmt: skip


def stored(storage: str, q: Tensor, kv: DenseKV) -> tuple[Tensor, KVView]:
    """The queries, and the keys as a cache stores them."""
    if storage == "bf16":
        return q, kv
    cache = QuantizedCache(bits_k=4, bits_v=4)
    cache.append(kv.k[:, :, :-1], kv.v[:, :, :-1])
    return q, cache.append(kv.k[:, :, -1:], kv.v[:, :, -1:])


def summaries_of(kv: KVView, pattern: RulePattern) -> Tensor:
    """The summaries that a cache would keep of a view's keys."""
    kept = KeySummaries(pattern.rule.summary, pattern.rule.k_block)
    whole = kv.shape[2] // kept.block * kept.block
    kept.add(given_keys(kv)[0][:, :, :whole], whole)
    rows = kept.filled()
    assert rows is not None
    return rows


def _select_all(layers: Any, pattern: RulePattern, rows: list[Tensor]) -> None:
    for (q, kv), each in zip(layers, rows, strict=True):
        pattern.select(q, kv, kv.shape[2] - 1, each)


def _attend_all(layers: Any, pattern: RulePattern | None, rows: list[Tensor] | None) -> None:
    for i, (q, kv) in enumerate(layers):
        at = kv.shape[2] - 1
        blocks = None if pattern is None or rows is None else pattern.select(q, kv, at, rows[i])
        attend(make_call(q, kv, mask=Mask(), blocks=blocks, wants_lse=False))


def captured(work: Work) -> Work:
    """The work as a CUDA graph; as it is where there is no GPU."""
    if not on_gpu():
        return work
    work()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return partial(_replay, graph, work)


def _replay(graph: torch.cuda.CUDAGraph, work: Work) -> None:
    """One replay; `work` holds the tensors that the graph reads."""
    graph.replay()


def prompt_rows(keys: int, device: str) -> Iterator[Row]:
    """A whole prompt in chunks of 8k, one layer: dense, and each pattern with its selection."""
    chunk = min(8192, keys // 8)
    q, kv = inputs(keys, keys, device)
    totals = dict.fromkeys(("dense", *patterns(keys)), 0.0)
    kept: dict[str, list[float]] = {name: [] for name in patterns(keys)}
    for start in range(0, keys, chunk):
        part, view = q[:, :, start : start + chunk].contiguous(), kv_until(kv, start + chunk)
        whole = make_call(part, view, mask=Mask())
        works: dict[str, Work] = {"dense": lambda call=whole: attend(call)}
        for name, pattern in patterns(keys).items():
            rows = summarize(view.k, pattern.rule.k_block, pattern.rule.summary)
            kept[name].append(recall(part, view, pattern.select(part, view, start, rows), start))

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
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything")
    parser.add_argument("--keys", type=int, default=32_768, help="and four times as many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    begin, rows, long = time.perf_counter(), list[Row](), given.keys * 4
    each = given.seconds / 120
    parts: list[Callable[[], Iterator[Row]]] = [
        lambda: operator_rows(given.keys, given.device, each),
        lambda: captured_rows(long, "bf16", given.device, each),
        lambda: prompt_rows(given.keys, given.device),
        lambda: prompt_rows(long, given.device),
        lambda: step_rows(given.keys, given.device, each),
        lambda: step_rows(long, given.device, each),
        lambda: captured_rows(given.keys, "bf16", given.device, each),
        lambda: captured_rows(long, "int4", given.device, each),
        lambda: captured_rows(given.keys, "int4", given.device, each),
    ]
    for part in parts:
        if time.perf_counter() - begin > given.seconds * 0.8:
            rows.append({"part": "left out", "why": f"{given.seconds:g} s were over"})
        else:
            rows += _measured(part)
        write_whole(given.out, as_text({**origin(), "rows": rows}))


def _measured(part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part, printed; one that fails is a row that says so, and costs no other."""
    try:
        for row in part():
            print(row, flush=True)
            yield row
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(text, flush=True)
        yield {"part": "failed", "why": text}
    if on_gpu():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
