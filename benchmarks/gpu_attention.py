"""Attention on one GPU: every kind of call, by our kernels and by PyTorch's.

    python -m benchmarks.gpu_attention --out benchmarks/results/h200_attention.json

bfloat16, 32 query and 8 key/value heads, random data.  Packages of others (FlashAttention-3 and
others, docs/support.md) have a column where they are installed.  Prefill is timed by CUDA events,
decoding in one CUDA graph over several caches that together exceed the L2 cache.
"""

from __future__ import annotations

from benchmarks.gpu_measure import measure_host
from benchmarks.gpu_problems import Problem
from benchmarks.gpu_run import Row, main
from saccade.ops.attention.dispatch import PEERS

WHAT = "attention on one GPU, bf16, 32 query and 8 key/value heads; milliseconds of a call"
OURS = ("gluon", "triton")
TRAINING = (*OURS, "gluon_triton")
TORCH = ("cudnn", "flash2")


def square(length: int, head_dim: int = 128, **options: object) -> Problem:
    """As many queries as keys."""
    return Problem(queries=length, keys=length, head_dim=head_dim, **options)  # type: ignore[arg-type]


def forward() -> list[Row]:
    """Prefill, causal and over all keys, by length and head dimension."""
    problems = [square(n) for n in (4096, 8192, 16384, 32768)]
    problems += [square(16384, causal=False), square(16384, 64), square(16384, 256)]
    rows = [Row("forward", problem, (*OURS, *PEERS), TORCH) for problem in problems]
    narrow = [square(n, window=w) for n, w in ((32768, 1024), (32768, 4096))]
    narrow += [square(16384, dim, window=1024) for dim in (64, 256)]
    return [*rows, *(Row("window", problem, (*OURS, *PEERS)) for problem in narrow)]


def flex() -> list[Row]:
    """A window and a selection of blocks beside FlexAttention, which compiles for a minute."""
    problems = {"window": square(16384, window=1024), "blocks": square(32768, density=0.25)}
    return [Row(case, problem, OURS, ("flex",)) for case, problem in problems.items()]


def gradients() -> list[Row]:
    """The backward pass."""
    problems = [square(8192, training=True), square(8192, 64, training=True)]
    problems += [square(32768, training=True), square(8192, causal=False, training=True)]
    rows = [Row("backward", problem, (*TRAINING, *PEERS), TORCH) for problem in problems]
    narrow = square(8192, window=1024, training=True)
    return [*rows, Row("backward", narrow, (*TRAINING, *PEERS))]


def sequences() -> list[Row]:
    """Packed sequences, rows of their own lengths and pages."""
    rows: list[Row] = []
    for dim in (128, 64, 256):
        for count, length in ((8, 4096), (64, 512))[: 2 if dim == 128 else 1]:
            packed = Problem(
                queries=count * length, keys=count * length, head_dim=dim,
                sequences=(length,) * count,
            )  # fmt: skip
            rows.append(Row("packed", packed, (*OURS, *PEERS)))
    lengths = (8192, 6000, 4096, 7777)
    own = Problem(queries=2048, keys=8192, batch=4, kv_lens=lengths)
    rows.append(Row("kv_lens", own, OURS))
    for storage, queries, keys in (("page16", 2048, 8192), ("page16", 512, 32768)):
        chunk = Problem(queries=queries, keys=keys, storage=storage)
        rows.append(Row("pages", chunk, OURS))
    return rows


def chunked() -> list[Row]:
    """A chunk of a prompt over what a ring or a quantized cache holds."""
    ring = Problem(queries=4096, keys=32768, window=4096, sinks=4, storage="ring")
    rows = [Row("chunk", ring, OURS)]
    for kind in ("int8", "fp8", "int4"):
        quantized = Problem(queries=4096, keys=32768, storage=kind)
        rows.append(Row("chunk", quantized, OURS))
    return [*rows, Row("chunk", Problem(queries=4096, keys=32768), OURS)]


def fp8() -> list[Row]:
    """Queries, keys and values in fp8, beside bfloat16 of the same shape in the table before."""
    problems = [square(n, storage="e4m3") for n in (4096, 16384, 32768)]
    problems += [square(16384, causal=False, storage="e4m3"), square(16384, 64, storage="e4m3")]
    return [Row("e4m3", problem, ("gluon_fp8",), ("cudnn",)) for problem in problems]


def decode() -> list[Row]:
    """Steps over plain keys, pages, quantized caches and windows."""
    sizes = [(1, 4096), (1, 8192), (1, 32768), (1, 131072), (16, 8192), (64, 8192)]
    rows = [
        Row("decode", Problem(queries=1, keys=keys, batch=batch), (*OURS, *PEERS), TORCH)
        for batch, keys in sizes
    ]
    for storage in ("page16", "page64", "int8", "fp8", "int4"):
        rows += [
            Row("decode", Problem(queries=1, keys=keys, batch=batch, storage=storage), OURS)
            for batch, keys in ((1, 32768), (1, 131072), (16, 8192))
        ]
    narrow = Problem(queries=1, keys=32768, batch=16, window=4096)
    return [*rows, Row("decode", narrow, OURS)]


def host() -> list[Row]:
    """What a short call costs the host."""
    few = [Problem(queries=32, keys=32), Problem(queries=1, keys=32)]
    return [Row("host", problem, ("auto", *OURS, *PEERS), measure=measure_host) for problem in few]


def rows() -> list[Row]:
    """The whole table, the most important cases first."""
    most = [*forward(), *decode(), *gradients(), *fp8(), *sequences(), *chunked()]
    return [*most, *host(), *flex()]


if __name__ == "__main__":
    main(WHAT, rows())
