"""Decoding on one Hopper card: launches of the Gluon kernel beside the Triton kernel and cuDNN.

python lab/time_pages.py [0 | 1 | 2]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from gpu_attention import _peer_decode, _view, demand, graph_seconds, random

from saccade.core import Mask
from saccade.ops import attend, attention
from saccade.ops.attend.gluon import decode_launch as launcher
from saccade.ops.attend.gluon.decode_launch import DecodeLaunch

TOUCH = len(sys.argv) > 1  # compile all, time nothing: every third case, from this one on
LAUNCHES = {
    128: [
        DecodeLaunch(4, 2, 3),
        DecodeLaunch(4, 3, 2),
        DecodeLaunch(4, 1, 4),
        DecodeLaunch(8, 1, 2),
    ],
    64: [
        DecodeLaunch(4, 2, 6),
        DecodeLaunch(4, 3, 4),
        DecodeLaunch(4, 1, 8),
        DecodeLaunch(8, 1, 4),
    ],
}
# (kind, batch, keys, query heads, queries, head_dim, window); eight KV heads
CASES = [
    ("dense", 1, 8192, 32, 1, 128, None),
    ("page16", 1, 8192, 32, 1, 128, None),
    ("dense", 1, 32768, 32, 1, 128, None),
    ("page16", 1, 32768, 32, 1, 128, None),
    ("dense", 16, 8192, 32, 1, 128, None),
    ("page16", 16, 8192, 32, 1, 128, None),
    ("dense", 1, 1024, 32, 1, 128, None),
    ("page16", 1, 1024, 32, 1, 128, None),
    ("dense", 1, 3072, 32, 1, 128, None),
    ("dense", 4, 8192, 32, 1, 128, None),
    ("page16", 4, 8192, 32, 1, 128, None),
    ("dense", 8, 8192, 32, 1, 128, None),
    ("dense", 64, 2048, 32, 1, 128, None),
    ("page16", 64, 2048, 32, 1, 128, None),
    ("dense", 1, 32768, 64, 1, 128, None),
    ("dense", 1, 32768, 32, 1, 64, None),
    ("page16", 1, 32768, 32, 1, 64, None),
    ("dense", 32, 8192, 32, 1, 64, None),
    ("page16", 1, 131072, 32, 1, 128, None),
    ("dense", 1, 32768, 32, 1, 128, 4096),
    ("page16", 16, 8192, 32, 1, 128, 2048),
]


def main() -> None:
    print(torch.cuda.get_device_name())
    for kind, batch, length, heads, rows, dim, window in (
        CASES[int(sys.argv[1]) :: 3] if TOUCH else CASES
    ):
        size = batch * 8 * length * dim * 4
        sets = 1 if TOUCH else max(2, min(8, 400_000_000 // size + 1))
        queries = [random(batch, heads, rows, dim) for _ in range(sets)]
        stores = [[random(batch, 8, length, dim) for _ in range(2)] for _ in range(sets)]
        views = [_view(kind, k, v)[0] for k, v in stores]
        first = queries[0][:1, : heads // 8], *(x[:1, :1] for x in stores[0])
        truth = attention(*(x.double() for x in first), window=window, backend="reference")
        loops, mask, found = 4 if size < 2**28 else 1, Mask(window=window), []

        def time(name, backend, queries=queries, views=views, truth=truth, mask=mask, loops=loops):
            steps = [
                lambda q=q, view=view: attend(q, view, mask=mask, backend=backend).out
                for q, view in zip(queries, views, strict=True)
            ]
            try:
                demand(steps[0]()[:1, : truth.shape[1]], truth, 1e-2, "decode")
                return f"{name} {graph_seconds(steps, loops, 9) * 1e6:.1f}" if not TOUCH else name
            except Exception as error:
                return f"{name} {type(error).__name__}: {str(error)[:80]}"

        if kind == "dense" and rows == 1 and window is None and not TOUCH:
            found.append(f"cudnn {_peer_decode('cudnn', queries, stores, loops) * 1e6:.1f}")
        found.append(time("triton", "triton"))
        for launch in LAUNCHES[dim]:
            launcher.launch_of = lambda *_, launch=launch: launch
            name = f"{launch.warps}x{launch.per_sm}x{launch.stages}"
            found.append(time(name, "gluon"))
        print(kind, batch, length, heads, rows, dim, window or "", "  ".join(found), flush=True)


main()
