"""Decoding over the latents of multi-head latent attention (MLA, arXiv 2405.04434) on one GPU.

    python -m benchmarks.gpu_latent --out benchmarks/results/h200_latent.json

bfloat16, one KV head of 576 channels, whose first 512 are the values: 128 query heads (DeepSeek-V3)
or the 16 that one of eight GPUs has.  Beside our kernels PyTorch's, in which all heads are queries
of one head: scaled_dot_product_attention, and two products with a softmax between them.  Caches of
a row together exceed the L2 cache; `reading` is the share of the memory bandwidth, measured in the
same run, at which a step reads its keys once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from benchmarks.gpu_measure import LATENT_PEERS, measure
from benchmarks.gpu_problems import Problem
from benchmarks.gpu_run import Row, main
from saccade.bench.gpu import ceilings, on_gpu

WHAT = "decoding over latents of 576 channels, bf16; milliseconds of a step"
OURS = ("triton", "fa3")
PAGES = "latent64"


@cache
def read_gbs() -> float:
    """Bytes that the GPU reads in a nanosecond; 1 without a GPU."""
    return ceilings()["read_gbs"] if on_gpu() else 1.0


def measured(problem: Problem, backends: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """A row with `reading`."""
    row = measure(problem, backends, peers)
    share = {name: 1e3 * row["gbytes"] / ms / read_gbs() for name, ms in row["ms"].items()}
    return row | {"reading": share}


def step(heads: int, batch: int, keys: int, queries: int = 1, storage: str = "latent") -> Row:
    """One step."""
    problem = Problem(
        queries=queries, keys=keys, batch=batch, head_dim=576, heads=heads, kv_heads=1,
        storage=storage,
    )  # fmt: skip
    plain = queries == 1 and storage == "latent"
    return Row("mla_decode", problem, OURS, LATENT_PEERS if plain else (), measure=measured)


def rows() -> list[Row]:
    """The table, the most important cases first."""
    sizes = [(batch, keys) for keys in (4096, 32768) for batch in (1, 16, 64)]
    plain = [step(heads, *size) for heads in (16, 128) for size in sizes]
    paged = [step(heads, 16, 4096, storage=PAGES) for heads in (16, 128)]
    return [*plain, *paged, step(16, 16, 4096, queries=4), step(128, 16, 4096, queries=4)]


if __name__ == "__main__":
    main(WHAT, rows())
