"""Reading alone: a loop that only reads the bytes of a case, sampled alternately with the kernels.

A ceiling measured minutes earlier is no ceiling on a machine whose memory others use as well, so
decoding is compared with a reader whose samples alternate with its own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import cycle

import torch

from saccade.bench import ceilings
from saccade.bench.inputs import COLD_BYTES
from saccade.bench.peers import Call
from saccade.bench.record import Row
from saccade.ops.attention.cpu.binding import record as tensor_record

READS = "reads"
TITLE = "reading alone"
_READ = 32 << 10  # floats that a thread reads at a time


def reading(row: Row) -> tuple[Row, Call] | None:
    """A row and a call that reads as many bytes as `row` needs; None without the C++ extension."""
    kernels = ceilings.extension()
    floats = row.nbytes // 4 // _READ * _READ
    if kernels is None or floats == 0:
        return None
    vectors = cycle([torch.ones(floats) for _ in range(-(-COLD_BYTES // (4 * floats)))])
    threads, target = torch.get_num_threads(), os.environ.get(ceilings.TARGET, "")

    def call() -> tuple[torch.Tensor, ...]:
        kernels.read_through(tensor_record(next(vectors)), threads, target=target)
        return ()

    return replace(row, backend=READS, ours=False, flops=0.0, nbytes=4 * floats), call
