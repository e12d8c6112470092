"""Which launch a Triton kernel gets: tables per architecture, looked up by head dimension.

The tables are data, `measured/launches/ARCHITECTURE.json`, read when first needed.  An
architecture without a file gets `default.json`, which fits the 99 KiB of shared memory of
consumer Ampere, Ada and Blackwell cards, so it is small and safe rather than fast.  The
environment variable SACCADE_TUNING names one more file, as `saccade bench tune` writes it: its
rows stand before the package's on cards of its architecture.  Nothing else is looked for.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from saccade.core import BadInput
from saccade.ops.gpu.support import INTERPRETER, architecture
from saccade.ops.tuning import files as launches
from saccade.ops.tuning.files import Launch, LaunchFile, Table

DEFAULT = "default"
VARIABLE = "SACCADE_TUNING"
FOLDER = Path(__file__).parent / "measured" / "launches"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A name in the tables, and what for people; `kernel[architecture]` is its table there."""

    name: str
    what: str

    def __getitem__(self, arch: str) -> Table:
        return tables(arch)[self.name]


FORWARD = Kernel("forward", "prefill over dense keys")
FORWARD_SHORT = Kernel("forward_short", "prefill in a window: few tiles a program")
FORWARD_LISTED = Kernel("forward_listed", "prefill over selected blocks: addresses from lists")
KEYS = Kernel("keys", "gradients of keys and values")
QUERIES = Kernel("queries", "gradients of queries")
DECODE = Kernel("decode", "few queries over keys one after the other in memory")
DECODE_PAGES = Kernel("decode_pages", "few queries over keys found through a page table")
DECODE_CODES = Kernel("decode_codes", "few queries over codes; their group bounds block_n too")
FLOAT32 = Kernel("float32", "any kernel in full float32, outside the matrix units: small tiles")

KERNELS = {
    kernel.name: kernel
    for kernel in (
        FORWARD, FORWARD_SHORT, FORWARD_LISTED, KEYS, QUERIES,
        DECODE, DECODE_PAGES, DECODE_CODES, FLOAT32,
    )
}  # fmt: skip

_trials: dict[str, Launch] = {}


def pick(kernel: Kernel, x: torch.Tensor, dim: int) -> Launch:
    """The configuration of one kernel for tensors like `x` and head dimensions up to `dim`."""
    if _trials and kernel.name in _trials:
        return _trials[kernel.name]
    return _row(kernel.name, architecture(x.device), x.dtype == torch.float32, dim)


@contextmanager
def trial(kernel: Kernel, launch: Launch) -> Generator[None]:
    """Inside the `with`, `pick` gives that launch for the kernel, whatever the tables say.

    Not a context variable: autograd launches backward kernels from threads of its own.
    """
    before = dict(_trials)
    _trials[kernel.name] = launch
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)


def forget() -> None:
    """Read the tables again when they are next needed, SACCADE_TUNING too."""
    for remembered in (_row, tables, shipped, of_the_user):
        remembered.cache_clear()


@cache
def tables(arch: str) -> dict[str, Table]:
    """Tables of all kernels on an architecture: the default's, the package's, the user's rows."""
    default, own, user = shipped(DEFAULT), shipped(arch), of_the_user()
    assert default is not None
    found = default.kernels | (own.kernels if own else {})
    if user is not None and user.architecture == arch:
        found |= {name: launches.joined(found[name], rows) for name, rows in user.kernels.items()}
    return found


@cache
def shipped(arch: str) -> LaunchFile | None:
    """The package's file for an architecture, None where it has none."""
    path = FOLDER / f"{arch}.json"
    return launches.read(path, KERNELS) if path.exists() else None


@cache
def of_the_user() -> LaunchFile | None:
    """The file that SACCADE_TUNING names, None where it is not set.

    Raises:
        BadInput: the file is missing or wrong.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        return launches.read(Path(name).expanduser(), KERNELS)
    except BadInput as error:
        raise BadInput(f"{VARIABLE}: {error}") from error.__cause__


@cache
def _row(name: str, arch: str, full: bool, dim: int) -> Launch:
    table = tables(arch)[FLOAT32.name if full and arch != INTERPRETER else name]
    return next(launch for limit, launch in table if dim <= limit)
