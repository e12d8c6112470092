"""Launch configurations of the Triton kernels as data: per architecture, by head dimension.

A row serves head dimensions up to its first number.  Rows for sm_90 were measured on an H200
(benchmarks/results); the default has to fit the 99 KiB of shared memory of consumer Ampere, Ada
and Blackwell cards, so it is small and safe rather than fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

INTERPRETER = "interpreter"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is cut and launched.

    Attributes:
        block_m, block_n: queries and keys of a tile (decode: keys only, rows follow the group).
        warps, stages: warps of a program, depth of its load pipeline.
        bulk: fetch tiles with the copy engine (TMA), where strides allow it.
        per_sm: programs to aim for per multiprocessor when decoding splits the keys.
        registers: most registers a thread may take, 0 for what the compiler likes.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    bulk: bool = False
    per_sm: int = 1
    registers: int = 0


Table = tuple[tuple[int, Launch], ...]

FORWARD: dict[str, Table] = {
    "sm_90": (
        (64, Launch(64, 128, 4, 3, bulk=True)),
        (128, Launch(128, 128, 8, 3)),
        (256, Launch(128, 64, 8, 2)),
        (512, Launch(64, 32, 8, 2)),
    ),
    DEFAULT: (
        (64, Launch(128, 64, 4, 2)),
        (128, Launch(64, 64, 4, 2)),
        (256, Launch(64, 32, 8, 1)),
        (512, Launch(32, 16, 8, 1)),
    ),
    INTERPRETER: ((512, Launch(32, 16, 4, 1)),),
}

FORWARD_SHORT: dict[str, Table] = {  # few tiles a program: windows
    "sm_90": (
        (128, Launch(64, 64, 4, 3)),
        (256, Launch(64, 64, 4, 2)),
        (512, Launch(64, 32, 8, 2)),
    ),
    DEFAULT: FORWARD[DEFAULT],
    INTERPRETER: FORWARD[INTERPRETER],
}

FORWARD_LISTED: dict[str, Table] = {  # tiles of a BlockSelection, whose addresses come from lists
    "sm_90": (
        (128, Launch(128, 128, 8, 2)),
        (256, Launch(64, 64, 4, 2)),
        (512, Launch(64, 32, 8, 2)),
    ),
    DEFAULT: FORWARD[DEFAULT],
    INTERPRETER: FORWARD[INTERPRETER],
}

KEYS: dict[str, Table] = {  # the backward kernel that owns keys
    "sm_90": (
        (64, Launch(128, 64, 4, 2)),
        (128, Launch(64, 128, 8, 1)),
        (256, Launch(32, 64, 8, 1)),
        (512, Launch(16, 32, 8, 1)),
    ),
    DEFAULT: (
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(32, 64, 8, 1)),
        (256, Launch(16, 32, 8, 1)),
        (512, Launch(16, 16, 8, 1)),
    ),
    INTERPRETER: ((512, Launch(16, 32, 4, 1)),),
}

QUERIES: dict[str, Table] = {  # the backward kernel that owns queries
    "sm_90": (
        (64, Launch(128, 64, 4, 3)),
        (128, Launch(128, 64, 8, 3)),
        (256, Launch(64, 32, 8, 1)),
        (512, Launch(32, 16, 8, 1)),
    ),
    DEFAULT: (
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(64, 32, 8, 1)),
        (256, Launch(32, 16, 8, 1)),
        (512, Launch(16, 16, 8, 1)),
    ),
    INTERPRETER: ((512, Launch(32, 16, 4, 1)),),
}

_SMALL_DECODE = (
    (64, Launch(64, 64, 4, 2, per_sm=2)),
    (128, Launch(32, 64, 4, 2, per_sm=2)),
    (256, Launch(16, 32, 4, 2, per_sm=2)),
    (512, Launch(16, 16, 4, 2, per_sm=2)),
)
_TINY_DECODE = ((512, Launch(16, 16, 4, 1)),)

DECODE: dict[str, Table] = {  # keys one after the other in memory
    "sm_90": (
        (64, Launch(64, 128, 4, 4)),
        (128, Launch(64, 128, 4, 3)),
        (256, Launch(64, 64, 4, 3)),
        (512, Launch(32, 32, 4, 2)),
    ),
    DEFAULT: _SMALL_DECODE,
    INTERPRETER: _TINY_DECODE,
}

DECODE_PAGES: dict[str, Table] = {  # keys found through a page table
    "sm_90": (
        (64, Launch(64, 128, 4, 5)),
        (128, Launch(64, 128, 4, 5)),
        (256, Launch(64, 64, 4, 5)),
        (512, Launch(32, 32, 4, 2, per_sm=2)),
    ),
    DEFAULT: _SMALL_DECODE,
    INTERPRETER: _TINY_DECODE,
}

DECODE_CODES: dict[str, Table] = {  # quantised keys; block_n is also bounded by their group
    "sm_90": (
        (128, Launch(16, 64, 1, 2, per_sm=6)),
        (256, Launch(16, 32, 4, 2, per_sm=2)),
        (512, Launch(16, 32, 8, 1, per_sm=1)),
    ),
    DEFAULT: _SMALL_DECODE,
    INTERPRETER: _TINY_DECODE,
}

FLOAT32 = (  # products in full float32 run outside the matrix units: small tiles
    (64, Launch(32, 32, 4, 1)),
    (128, Launch(32, 32, 4, 1)),
    (256, Launch(16, 16, 4, 1)),
    (512, Launch(16, 16, 4, 1)),
)


@cache
def architecture(device: torch.device) -> str:
    """Name of the table row family: "sm_90", or "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; a small number for the interpreter, so that it splits too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick(tables: dict[str, Table], x: torch.Tensor, dim: int) -> Launch:
    """The configuration of one kernel for tensors like `x` and head dimensions up to `dim`."""
    arch = architecture(x.device)
    table = tables.get(arch, tables[DEFAULT])
    if x.dtype == torch.float32 and arch != INTERPRETER:
        table = FLOAT32
    return next(launch for limit, launch in table if dim <= limit)
