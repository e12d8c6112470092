"""Try launch configurations of the Triton kernels on a card; figures go to LOG_gpu.md by hand.

python lab/sweep_triton.py [worker workers]     # with a worker: only compile, in parallel
"""

import sys

import torch

sys.path.insert(0, ".")
from benchmarks.gpu_attention import _view, graph_seconds, random, seconds
from saccade.core import DenseKV, Mask
from saccade.ops import attend, attention, tuning
from saccade.ops.attend import triton_launch as launchers
from saccade.ops.attend.api import make_call
from saccade.ops.attend.triton_problem import dense_problem
from saccade.ops.tuning import Launch

FORWARD = {128: [(128, 128, 8, 3, 0)]}
SHORT = [(64, 64, 4, 3, 0)]
KEYS = {
    128: [(64, 128, 8, 1)],
    64: [(64, 128, 8, 2), (64, 128, 4, 2), (64, 128, 4, 1), (64, 128, 8, 1), (128, 128, 8, 1),
         (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 4, 2)],
}  # fmt: skip
QUERIES = {
    128: [(128, 64, 8, 3)],
    64: [(128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 3),
         (128, 128, 8, 2)],
}  # fmt: skip
DECODE = {"dense": [(64, 128, 4, 3)], "int8": [(16, 64, 1, 2)], "int4": [(16, 64, 1, 2)]}
SHAPES = [(1, 8192), (1, 32768), (1, 131072), (16, 8192)]


def table(launch):
    return ((512, launch),)


def forward(dim, config, compile_only):
    tuning.FORWARD["sm_90"] = table(Launch(*config[:4], bool(config[4])))
    length = 16384
    q, k, v = (random(1, h, length, dim) for h in (32, 8, 8))
    run = lambda: attention(q, k, v, backend="triton")  # noqa: E731
    if compile_only:
        return run()
    work = 4 * 32 * dim * Mask().num_pairs(length, length) / 1e12
    return print(f"forward D{dim} {config}: {work / seconds(run, 7, 2):.0f} TF/s", flush=True)


def short(what, config, compile_only):
    tuning.FORWARD_SHORT["sm_90"] = table(Launch(*config[:4], bool(config[4])))
    window, length = what
    q, k, v = (random(1, h, length, 128) for h in (32, 8, 8))
    run = lambda: attention(q, k, v, window=window, backend="triton")  # noqa: E731
    if compile_only:
        return run()
    work = 4 * 32 * 128 * Mask(window=window).num_pairs(length, length) / 1e12
    return print(f"short {what} {config}: {work / seconds(run, 9, 3):.0f} TF/s", flush=True)


def backward(what, config, compile_only):
    which, dim = what
    tables = {"keys": tuning.KEYS, "queries": tuning.QUERIES}
    tables[which]["sm_90"] = table(Launch(*config))
    length = 8192
    q, k, v = (random(1, h, length, dim) for h in (32, 8, 8))
    problem = dense_problem(make_call(q, DenseKV(k, v), mask=Mask()))
    lse = torch.randn(1, 32, length, device="cuda") + 5
    planes = tuple(launchers.plane(x) for x in (q, k, v, q))
    if which == "keys":
        run = lambda: launchers._keys(problem, planes, k.clone(), v.clone(), lse, lse)  # noqa: E731
    else:
        run = lambda: launchers._queries(problem, planes, q.clone(), lse, lse)  # noqa: E731
    if compile_only:
        return run()
    work = 10 * 32 * dim * Mask().num_pairs(length, length) / 1e12
    took = seconds(run, 7, 2)
    return print(
        f"{which} {config}: {took * 1e3:.2f} ms ({work / took:.0f} TF/s alone)", flush=True
    )


def decode(kind, config, compile_only):
    names = {"dense": tuning.DECODE, "page16": tuning.DECODE_PAGES}
    line = []
    for batch, length in SHAPES[:1] if compile_only else SHAPES:
        sets = 8 if batch * length < 20000 else 2
        stores = [_view(kind, *(random(batch, 8, length, 128) for _ in range(2)))
                  for _ in range(sets)]  # fmt: skip
        q = random(batch, 32, 1, 128)
        for per_sm in (2,) if compile_only else (1, 2, 4, 8, 16):
            names.get(kind, tuning.DECODE_CODES)["sm_90"] = table(Launch(*config, per_sm=per_sm))
            runs = [lambda q=q, s=s: attend(q, s[0], mask=Mask(), backend="triton") for s in stores]
            if compile_only:
                return runs[0]()
            took = graph_seconds(runs, 4 if sets == 8 else 1)
            line.append(f"{took * 1e6:.1f}us/{stores[0][1] / took / 1e9:.0f}")
        del stores
        line.append("|")
    return print(f"decode {kind} {config}: {' '.join(line)}", flush=True)


def tasks():
    for dim, configs in FORWARD.items():
        for config in configs:
            yield forward, dim, config
    for config in SHORT:
        for what in ((1024, 16384), (4096, 32768), (None, 4096)):
            yield short, what, config
    for which, configs in (("keys", KEYS), ("queries", QUERIES)):
        for dim, config in ((dim, config) for dim, found in configs.items() for config in found):
            yield backward, (which, dim), config
    for kind, configs in DECODE.items():
        for config in configs:
            yield decode, kind, config


if __name__ == "__main__":
    compile_only = len(sys.argv) > 2
    worker, workers = map(int, sys.argv[1:3]) if compile_only else (0, 1)
    for i, (task, what, config) in enumerate(tasks()):
        if i % workers == worker:
            try:
                task(what, config, compile_only)
            except Exception as error:
                print(
                    task.__name__, what, config, type(error).__name__, str(error)[:90], flush=True
                )
