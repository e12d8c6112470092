"""Decoding on one GPU: launches against each other, beginning early or not.

python lab/sweep_decode.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_attention import PEERS, _peer_decode, _view, ceilings, demand, graph_seconds, random

from saccade.core import Mask
from saccade.ops import attend, attention
from saccade.ops.attention.nvidia.triton import split_kv as triton_views
from saccade.ops.tuning import tables as tuning

DENSE = [(128, 4, 3, 1), (64, 4, 4, 1)]
PAGED = [(128, 4, 5, 1), (128, 4, 7, 1), (64, 4, 8, 1), (64, 4, 12, 1), (128, 8, 7, 1)]
PDL = {"EARLY": True, "launch_pdl": True}
CASES = [
    ("dense", 1, 8192),
    ("dense", 1, 32768),
    ("dense", 1, 131072),
    ("dense", 16, 8192),
    ("page16", 1, 32768),
    ("page16", 16, 8192),
]


def main() -> None:
    print(ceilings())
    for kind, batch, length in CASES:
        size = batch * 8 * length * 128 * 4
        sets = max(2, min(8, 400_000_000 // size + 1))
        queries = [random(batch, 32, 1, 128) for _ in range(sets)]
        stores = [[random(batch, 8, length, 128) for _ in range(2)] for _ in range(sets)]
        views = [_view(kind, k, v)[0] for k, v in stores]
        steps = [
            lambda q=q, view=view: attend(q, view, mask=Mask(), backend="triton").out
            for q, view in zip(queries, views, strict=True)
        ]
        truth = attention(*(x[:1].double() for x in (queries[0], *stores[0])), backend="reference")
        loops = 4 if size < 2**28 else 1
        if kind == "dense":
            peers = {n: f"{_peer_decode(n, queries, stores, loops) * 1e6:.1f}" for n in PEERS}
            print(kind, batch, length, peers, flush=True)
        table = tuning.DECODE if kind == "dense" else tuning.DECODE_PAGES
        for n, warps, stages, per_sm in DENSE if kind == "dense" else PAGED:
            launch = tuning.Launch(64, n, warps, stages, per_sm=per_sm)
            for pdl_options in (True, False):
                triton_views.pdl_options = lambda _, pdl_options=pdl_options: (
                    PDL if pdl_options else {"EARLY": False}
                )
                try:
                    with tuning.trial(table, launch):
                        demand(steps[0]()[:1], truth, 1e-2, "decode")
                        took = graph_seconds(steps, loops)
                    found = f"{took * 1e6:.1f} us {size / took / 1e9:.0f} GB/s"
                except Exception as error:
                    found = f"{type(error).__name__}: {str(error)[:100]}"
                print(
                    kind, batch, length, launch, "early" if pdl_options else "", found, flush=True
                )


main()
