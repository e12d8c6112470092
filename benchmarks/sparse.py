"""Sparse attention beside dense attention on a CPU: selection, operator, and a whole model's steps.

    python -m benchmarks.sparse                          the operator, one thread
    python -m benchmarks.sparse --model smollm2          steps of a whole model too
    python -m benchmarks.sparse --only prompts           selections for prompts alone

Every result is compared with a formula in float64 before it is timed.  Dense and sparse calls run
in turns in one process, and medians are compared: all numbers that count are ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.hf.kascade_identity import identity
from saccade.hf.load import load_model
from saccade.hf.model import HFModel
from saccade.ops import AttentionCall, attend, make_call
from saccade.ops.attention.cpu.binding import extension, record, target
from saccade.ops.selection import summarize
from saccade.report.environment import cpu_name
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime import ContextParams
from saccade.runtime.model import ModelCache
from saccade.sparse import (
    BlockTopK,
    Kascade,
    KascadePlan,
    Pattern,
    Quest,
    RulePattern,
    TriangleMix,
    VerticalSlash,
    XAttention,
)
from saccade.sparse.kascade_plan import Reuse

SHAPES = {"SmolLM2, 9/3 heads of 64": (9, 3, 64), "8/2 heads of 128": (8, 2, 128)}
KEYS, CHUNK, READ = 32_768, 512, 2_048
DENSITIES = (0.10, 0.20, 0.25, 0.50)
Work = Callable[[], object]
Row = dict[str, Any]


def inputs(
    heads: int, kv_heads: int, dim: int, q_len: int, keys: int = KEYS
) -> tuple[Tensor, DenseKV]:
    """Random queries and keys in bfloat16, the queries at the end of the keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, q_len, dim, generator=generator).bfloat16()
    k, v = torch.randn(2, 1, kv_heads, keys, dim, generator=generator).bfloat16()
    return q, DenseKV(k, v)


def medians(works: Mapping[str, Work], seconds: float) -> dict[str, float]:
    """Median processor seconds of each, called in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, taken.values())) < 3:
        for name, work in works.items():
            begin = time.process_time()
            work()
            taken[name].append(time.process_time() - begin)
    return {name: statistics.median(each) for name, each in taken.items()}


def check(call: AttentionCall) -> None:
    """Fail where a call's result is not that of the formula for its last and first queries."""
    found, kv = attend(call, backend="cpu").out, call.kv
    assert isinstance(kv, DenseKV) and call.blocks is not None
    group, start = call.q.shape[1] // kv.k.shape[1], KEYS - call.q.shape[2]
    for i in {0, call.q.shape[2] - 1}:
        seen = call.blocks.visible(torch.tensor([i]), torch.arange(KEYS))[0, :, 0]
        seen = seen & (torch.arange(KEYS) <= start + i)
        for head in (0, call.q.shape[1] - 1):
            keys = seen.expand(kv.k.shape[1], -1)[head // group]
            k, v = (x[0, head // group, keys].double() for x in (kv.k, kv.v))
            weights = (k @ call.q[0, head, i].double() * call.scale).softmax(0)
            error = (found[0, head, i].double() - weights @ v).abs().max()
            assert error < 0.01, f"query {i} of head {head} is off by {float(error):.2g}"


def causal_pairs(blocks: BlockSelection, q_len: int) -> float:
    """Share of the visible pairs that a selection leaves."""
    at = torch.arange(KEYS - q_len, KEYS)
    seen = torch.arange(KEYS) <= at[:, None]
    chosen = blocks.visible(torch.arange(q_len), torch.arange(KEYS))[0] & seen
    return float(chosen.float().mean() / seen.float().mean())


def random_blocks(q_len: int, kv_heads: int, block: int, density: float) -> BlockSelection:
    """The block of each query, and others at random."""
    columns, rows = KEYS // block, q_len // block
    allowed = torch.rand(1, kv_heads, rows, columns) < density
    for row in range(rows):
        allowed[:, :, row, columns - rows + row] = True
    return BlockSelection(allowed=allowed, q_block=block, k_block=block)


def decode_rows(seconds: float) -> Iterator[Row]:
    """A step of one query over all keys: dense, selection alone, attention over the selection."""
    for label, (heads, kv_heads, dim) in SHAPES.items():
        q, kv = inputs(heads, kv_heads, dim, 1)
        for block in (32, 64):
            patterns: list[RulePattern] = [
                Quest(block=block, top=READ // block - 3),
                BlockTopK(block=block, top=READ // block - 5),
            ]
            for pattern in patterns:
                rows = summarize(kv.k, block, pattern.rule.summary)
                blocks = pattern.select(q, kv, KEYS - 1, rows)
                check(make_call(q, kv, mask=Mask(), blocks=blocks))
                found = medians(_decode_works(pattern, q, kv, rows, blocks), seconds)
                yield _row(f"decode, {label}, {type(pattern).__name__} {block}", found)


def _decode_works(
    pattern: RulePattern, q: Tensor, kv: DenseKV, rows: Tensor, blocks: BlockSelection
) -> dict[str, Work]:
    dense = make_call(q, kv, mask=Mask())
    sparse = make_call(q, kv, mask=Mask(), blocks=blocks)
    numbers, out = pattern.rule.numbers(q.shape[3] ** -0.5), torch.empty_like(blocks.allowed)
    kernels, threads = extension(), torch.get_num_threads()
    assert kernels is not None
    given = numbers, record(q), KEYS - 1, record(rows), record(out), threads, target()
    return {
        "dense": lambda: attend(dense, backend="cpu"),
        # As the layers of a decoder do; a record is pointers, so `out` has to live as long.
        "select in C++": lambda _kept=out: kernels.select_blocks(*given),
        "select": lambda: pattern.select(q, kv, KEYS - 1, rows),
        "attend": lambda: attend(sparse, backend="cpu"),
    }


def prefill_rows(seconds: float) -> Iterator[Row]:
    """A chunk of queries at the end of the keys, over blocks at random: time per pair."""
    for label, (heads, kv_heads, dim) in SHAPES.items():
        q, kv = inputs(heads, kv_heads, dim, CHUNK)
        dense = make_call(q, kv, mask=Mask())
        pattern = BlockTopK(top=40)
        rows = summarize(kv.k, pattern.block, "mean")
        works: dict[str, Work] = {
            "dense": lambda call=dense: attend(call, backend="cpu"),
            "select": partial(pattern.select, q, kv, KEYS - CHUNK, rows),
        }
        shares = {}
        for block in (64, 128):
            for density in DENSITIES:
                blocks = random_blocks(CHUNK, kv_heads, block, density)
                call, name = make_call(q, kv, mask=Mask(), blocks=blocks), f"{block} {density:.0%}"
                check(call)
                shares[name] = causal_pairs(blocks, CHUNK)
                works[name] = lambda call=call: attend(call, backend="cpu")
        found = medians(works, seconds)
        yield _row(f"prefill of {CHUNK}, {label}", found) | {"pairs": shares}


def prompt_rows(seconds: float) -> Iterator[Row]:
    """Selections of chunks of a prompt from its keys, beside dense attention of the chunk."""
    patterns = (XAttention(), XAttention(block=128), VerticalSlash(), TriangleMix())
    for label, (heads, kv_heads, dim) in SHAPES.items():
        for keys, chunk in product((8_192, 16_384, KEYS), (CHUNK, 4 * CHUNK)):
            q, kv = inputs(heads, kv_heads, dim, chunk, keys)
            works: dict[str, Work] = {
                "dense": partial(attend, make_call(q, kv, mask=Mask()), backend="cpu")
            }
            for pattern in patterns:
                if keys == KEYS:
                    blocks = pattern.select(q, kv, keys - chunk)
                    check(make_call(q, kv, mask=Mask(), blocks=blocks))
                works[repr(pattern)] = partial(pattern.select, q, kv, keys - chunk)
            name = f"selection for {chunk:,} queries over {keys:,} keys, {label}"
            yield _row(name, medians(works, seconds))


def _row(name: str, found: Mapping[str, float]) -> Row:
    """Median milliseconds of each work, and its share of the dense one's."""
    shares = {key: seconds / found["dense"] for key, seconds in found.items() if key != "dense"}
    return {"name": name, "dense_ms": found["dense"] * 1e3, "of_dense": shares}


def text_of(row: Row) -> str:
    """A row as lines."""
    pairs = row.get("pairs", {})
    shares = [f"{key} {share:.4f}" for key, share in row["of_dense"].items() if key not in pairs]
    lines = [f"{row['name']}: dense {row['dense_ms']:.2f} ms; of that {', '.join(shares)}"]
    for key, share in pairs.items():
        ratio = row["of_dense"][key] / share
        lines.append(f"    blocks of {key}: {share:.3f} of the pairs, {ratio:.2f} x their time")
    return "\n".join(lines)


def model_row(name: str, length: int, seconds: float) -> Row:
    """Steps of a whole model over a context of random keys, under each pattern.

    The plan of Kascade has an anchor every six layers; where they are does not change the time.
    """
    model = load_model(name).model
    patterns: dict[str, Pattern | None] = {
        "dense": None,
        "quest": Quest(block=32, top=READ // 32 - 3),
        "block_topk": BlockTopK(top=READ // 64 - 5),
        "kascade": Kascade(top=READ // 64 - 3, plan=_plan(model)),
        "kascade without a plan": Kascade(top=READ // 64 - 3),
    }
    token, works = torch.tensor([[17]]), dict[str, Work]()
    with ExitStack() as stack, torch.inference_mode():
        for label, pattern in patterns.items():
            params = ContextParams(rope_scaling_type="yarn", rope_freq_scale=0.25, sparse=pattern)
            attached = stack.enter_context(HFModel(model).attached(params))
            cache = _filled(attached, params, length)
            works[label] = partial(attached.hidden, token, cache)
        return _row(f"a step of {name} at {length:,} tokens", medians(works, seconds))


def _plan(model: PreTrainedModel) -> KascadePlan:
    config = model.config
    heads = tuple(range(config.num_key_value_heads))
    layers = [Reuse((i - 1) // 6 * 6 + 1, heads, 1.0) for i in range(1, config.num_hidden_layers)]
    return KascadePlan(**identity(model), layers=(None, *layers), tokens=0, block=64, top=1)


def _filled(attached: HFModel, params: ContextParams, length: int) -> ModelCache:
    """Caches that hold random keys."""
    cache, facts = attached.new_cache(params, reserve=length + 4096), attached.facts
    generator = torch.Generator().manual_seed(0)
    shape = 2, 1, facts.num_kv_heads, length, facts.head_dim
    for store in cache.stores:
        store.append(*torch.randn(shape, generator=generator).to(facts.dtype))
    return cache


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="measure steps of this model too")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of the model's context")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--only", choices=("decode", "prefill", "prompts", "model"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{cpu_name()}, {given.threads} thread(s), bfloat16, {KEYS:,} keys")
    parts = {"decode": decode_rows, "prefill": prefill_rows, "prompts": prompt_rows}
    rows: list[Row] = []
    for name, part in parts.items():
        if given.only in (None, name):
            rows += _printed(part(given.seconds))
    if given.model and given.only in (None, "model"):
        rows += _printed([model_row(given.model, given.length, given.seconds)])
    if given.json:
        write_whole(given.json, as_text({**origin(), "keys": KEYS, "chunk": CHUNK, "rows": rows}))


def _printed(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        print(text_of(row), flush=True)
        yield row


if __name__ == "__main__":
    main()
