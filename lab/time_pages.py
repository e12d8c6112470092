"""Decoding on one Hopper card: launches of the Gluon kernel beside the Triton kernel and cuDNN.

python lab/time_pages.py [touch]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from gpu_attention import _peer_decode, _view, demand, graph_seconds, random

from saccade.core import Mask
from saccade.ops import attend, attention
from saccade.ops.attend import gluon_decode_launch as launcher
from saccade.ops.attend.gluon_decode_launch import DecodeLaunch

TOUCH = "touch" in sys.argv
LAUNCHES = [
    DecodeLaunch(4, 1, 6),
    DecodeLaunch(4, 1, 4),
    DecodeLaunch(8, 1, 3),
    DecodeLaunch(8, 1, 2),
    DecodeLaunch(4, 2, 3),
    DecodeLaunch(4, 3, 2),
    DecodeLaunch(2, 2, 6),
]
CASES = [
    ("dense", 1, 8192),
    ("page16", 1, 8192),
    ("dense", 1, 32768),
    ("page16", 1, 32768),
    ("page64", 1, 32768),
    ("dense", 16, 8192),
    ("page16", 16, 8192),
    ("dense", 1, 131072),
]


def main() -> None:
    print(torch.cuda.get_device_name())
    for kind, batch, length in CASES:
        size = batch * 8 * length * 128 * 4
        sets = 1 if TOUCH else max(2, min(8, 400_000_000 // size + 1))
        queries = [random(batch, 32, 1, 128) for _ in range(sets)]
        stores = [[random(batch, 8, length, 128) for _ in range(2)] for _ in range(sets)]
        views = [_view(kind, k, v)[0] for k, v in stores]
        truth = attention(*(x[:1].double() for x in (queries[0], *stores[0])), backend="reference")
        loops = 4 if size < 2**28 else 1
        found = []

        def time(name, backend, queries=queries, views=views, truth=truth, loops=loops):
            steps = [
                lambda q=q, view=view: attend(q, view, mask=Mask(), backend=backend).out
                for q, view in zip(queries, views, strict=True)
            ]
            try:
                demand(steps[0]()[:1], truth, 1e-2, "decode")
                return f"{name} {graph_seconds(steps, loops) * 1e6:.1f}" if not TOUCH else name
            except Exception as error:
                return f"{name} {type(error).__name__}: {str(error)[:80]}"

        if kind == "dense" and not TOUCH:
            found.append(f"cudnn {_peer_decode('cudnn', queries, stores, loops) * 1e6:.1f}")
        found.append(time("triton", "triton"))
        for launch in LAUNCHES:
            launcher.LAUNCHES = {128: launch}
            name = f"{launch.warps}x{launch.per_sm}x{launch.stages}"
            found.append(time(name, "gluon"))
        print(kind, batch, length, "  ".join(found), flush=True)


main()
