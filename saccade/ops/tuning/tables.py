"""Which launch a Triton kernel gets: tables per architecture, looked up by head dimension.

The tables are data, `measured/launches/ARCHITECTURE.json`, read when first needed.  An
architecture without a file gets `default.json`, which fits the 99 KiB of shared memory of
consumer Ampere, Ada and Blackwell GPUs, so it is safe rather than fast.  The environment variable
SACCADE_TUNING names one more file, as `saccade bench tune` writes it: on GPUs of its architecture
its rows come before the package's.  No other file is searched for.
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
from saccade.ops.tuning import files
from saccade.ops.tuning.files import Launch, LaunchFile, Table

DEFAULT = "default"
VARIABLE = "SACCADE_TUNING"
FOLDER = Path(__file__).parent / "measured" / "launches"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of the tables; `kernel[architecture]` is its table there.

    Attributes:
        name: its key in the files; description: for people.
    """

    name: str
    description: str

    def __getitem__(self, arch: str) -> Table:
        return tables(arch)[self.name]


FORWARD = Kernel("forward", "prefill over dense keys")
FORWARD_WINDOW = Kernel("forward_window", "prefill in a window: few tiles per program")
FORWARD_BLOCK_SPARSE = Kernel("forward_block_sparse", "prefill over selected blocks")
BACKWARD_KV = Kernel("backward_kv", "gradients of keys and values")
BACKWARD_Q = Kernel("backward_q", "gradients of queries")
DECODE = Kernel("decode", "few queries over keys that are contiguous, or in a ring")
DECODE_PAGED = Kernel("decode_paged", "few queries over keys found through a page table")
DECODE_QUANTIZED = Kernel(
    "decode_quantized", "few queries over quantized keys, whose group is an upper bound of block_n"
)
DECODE_LATENT = Kernel(
    "decode_latent", "up to 16 rows over keys whose first channels, at most `dim`, are the values"
)
DECODE_LATENT_ROWS = Kernel("decode_latent_rows", "the same for more rows, with tiles of block_m")
FLOAT32 = Kernel("float32", "any kernel in full float32, without tensor cores: small tiles")

KERNELS = {
    kernel.name: kernel
    for kernel in (
        FORWARD, FORWARD_WINDOW, FORWARD_BLOCK_SPARSE, BACKWARD_KV, BACKWARD_Q,
        DECODE, DECODE_PAGED, DECODE_QUANTIZED, DECODE_LATENT, DECODE_LATENT_ROWS, FLOAT32,
    )
}  # fmt: skip

_trials: dict[str, Launch] = {}


def pick(kernel: Kernel, x: torch.Tensor, dim: int) -> Launch:
    """The launch of a kernel for tensors like `x` and a head dimension of `dim`."""
    if _trials and kernel.name in _trials:
        return _trials[kernel.name]
    return _row(kernel.name, architecture(x.device), x.dtype == torch.float32, dim)


@contextmanager
def trial(kernel: Kernel, launch: Launch) -> Generator[None]:
    """Inside the `with`, `pick` returns that launch for the kernel, whatever the tables say.

    Not a context variable, because autograd launches backward kernels from its own threads.
    """
    before = dict(_trials)
    _trials[kernel.name] = launch
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)


def clear_cache() -> None:
    """Read the tables and SACCADE_TUNING again when they are next needed."""
    for cached in (_row, tables, package_file, user_file):
        cached.cache_clear()


@cache
def tables(arch: str) -> dict[str, Table]:
    """Tables of all kernels on an architecture: the default's, the package's, the user's rows.

    Raises:
        BadInput: SACCADE_TUNING names a file that is missing or wrong.
    """
    default, own, user = package_file(DEFAULT), package_file(arch), user_file()
    assert default is not None
    found = default.kernels | (own.kernels if own else {})
    if user is not None and user.architecture == arch:
        found |= {name: files.overlay(found[name], rows) for name, rows in user.kernels.items()}
    return found


@cache
def package_file(arch: str) -> LaunchFile | None:
    """The package's file for an architecture, None where it has none."""
    path = FOLDER / f"{arch}.json"
    return files.read(path, KERNELS) if path.exists() else None


@cache
def user_file() -> LaunchFile | None:
    """The file that SACCADE_TUNING names, None where it is not set.

    Raises:
        BadInput: the file is missing or wrong.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        return files.read(Path(name).expanduser(), KERNELS)
    except BadInput as error:
        raise BadInput(f"{VARIABLE}: {error}") from error.__cause__


@cache
def _row(name: str, arch: str, full: bool, dim: int) -> Launch:
    table = tables(arch)[FLOAT32.name if full and arch != INTERPRETER else name]
    return next(launch for limit, launch in table if dim <= limit)
