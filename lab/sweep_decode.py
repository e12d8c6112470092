"""Decoding on one GPU: launches against each other, and against PyTorch's; right first.

python lab/sweep_decode.py compile WORKER WORKERS    # several at once, to warm the cache of kernels
python lab/sweep_decode.py                           # microseconds, the best last; then host time
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_attention import PEERS, _view, graph_seconds, host_seconds, random, relative, seconds
from torch.nn.attention import sdpa_kernel

from saccade.core import DenseKV, Mask
from saccade.ops import attend, attention, tuning
from saccade.ops.attend import triton_views
from saccade.ops.tuning import Launch

DENSE = [(Launch(64, 128, 4, 3), 0), (Launch(64, 128, 4, 3), 2), (Launch(64, 128, 4, 3), 4),
         (Launch(64, 64, 4, 4), 0), (Launch(64, 64, 4, 4), 4), (Launch(64, 64, 4, 6), 4),
         (Launch(64, 128, 4, 4), 2)]  # fmt: skip
PAGES = [(Launch(64, 128, 4, 3), 0), (Launch(64, 128, 4, 4), 0), (Launch(64, 64, 4, 4), 0),
         (Launch(64, 64, 4, 5), 0), (Launch(64, 64, 4, 6), 0),
         (Launch(64, 64, 4, 4, per_sm=2), 0)]  # fmt: skip
CASES = [("dense", 1, 8192, 32), ("dense", 1, 32768, 32), ("page16", 1, 32768, 32),
         ("page64", 1, 32768, 32), ("dense", 16, 8192, 32), ("page16", 16, 8192, 32),
         ("dense", 1, 131072, 32), ("dense", 1, 32768, 64), ("dense", 64, 8192, 32)]  # fmt: skip


def measure(kind: str, batch: int, length: int, heads: int, only: tuple[int, int] | None) -> dict:
    """Microseconds of each way; with `only`, compile that worker's share of them."""
    size = batch * 8 * length * 512
    sets = 1 if only else max(2, min(8, 400_000_000 // size + 1))
    stores = [[random(batch, 8, length, 128) for _ in range(2)] for _ in range(sets)]
    queries = [random(batch, heads, 1, 128) for _ in range(sets)]
    views = [_view(kind, k, v)[0] for k, v in stores]
    runs = [lambda q=q, view=view: attend(q, view, mask=Mask(), backend="triton").out
            for q, view in zip(queries, views, strict=True)]  # fmt: skip
    truth = attention(*(x[:1].double() for x in (queries[0], *stores[0])), backend="reference")
    found, loops = {}, 4 if size < 2**28 else 1
    kernel = tuning.DECODE if kind == "dense" else tuning.DECODE_PAGES
    for i, (launch, ask) in enumerate(DENSE if kind == "dense" else PAGES):
        if only and i % only[1] != only[0]:
            continue
        triton_views.ASK = ask
        with tuning.trial(kernel, launch):
            try:
                error = max(relative(runs[0]()[:1], truth) for _ in range(1 if only else 3))
                name = f"{launch.block_n} keys {launch.warps} warps {launch.stages} stages"
                name += f" {launch.per_sm} a sm, asks for {ask}"
                if not error < 1e-2:
                    print("WRONG", kind, batch, length, name, error, flush=True)
                elif not only:
                    found[name] = graph_seconds(runs, loops) * 1e6
            except Exception as failure:
                print(kind, batch, length, launch, ask, repr(failure)[:150], flush=True)
    for name, backend in PEERS.items() if kind == "dense" and not only else ():
        with sdpa_kernel(backend):
            peers = [lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                     for q, (k, v) in zip(queries, stores, strict=True)]  # fmt: skip
            found[name] = graph_seconds(peers, loops) * 1e6
    return found


def host() -> None:
    """What an eager call costs the host."""
    q, k, v = (random(1, h, n, 128) for h, n in ((32, 1), (8, 8192), (8, 8192)))
    view, mask = DenseKV(k, v), Mask()
    for name, run in {
        "attention": lambda: attention(q, k, v, backend="triton"),
        "attention, auto": lambda: attention(q, k, v),
        "attend": lambda: attend(q, view, mask=mask, backend="triton"),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }.items():
        print(f"host: {name} {host_seconds(run) * 1e6:.0f} us", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        for kind in ("dense", "page16", "page64"):
            measure(kind, 1, 8192, 32, (int(sys.argv[2]), int(sys.argv[3])))
        return
    host()
    big = torch.randn(2**29, device="cuda")
    ceiling = big.numel() * 4 / seconds(big.sum) / 1e9
    print(torch.cuda.get_device_name(), f"reads {ceiling:.0f} GB/s", flush=True)
    del big
    for case in CASES:
        found = measure(*case, None)
        ideal = case[1] * 8 * case[2] * 512 / ceiling / 1e3
        print(*case, f"reading alone {ideal:.1f} us")
        for name, us in sorted(found.items(), key=lambda x: -x[1]):
            print(f"  {us:7.1f} us {ideal / us:5.0%}  {name}", flush=True)


main()
