"""What the machine could do at best: rates of products and reads, measured in the same run.

With the C++ extension both come from loops that do nothing else.  Without it a large matrix
product and a large sum stand in; they stay below the true ceiling, and the record says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from saccade.ops.attention.cpu.binding import extension

TARGET = "SACCADE_CPU_TARGET"  # for tests: which of the compiled kernels to use
EXTENSION = "extension"
STAND_IN = "torch matmul and sum (a stand-in, below the true ceiling)"
BUSY = 0.85  # a sample below this share of the best one: something else used the machine


@dataclass(slots=True, kw_only=True)
class Ceilings:
    """The best of all samples of a run.

    Attributes:
        fma_peak: float32 operations a second; read_bandwidth: bytes a second.
        threads: that measured; source: how; target: instruction set of the kernels, "" unknown.
        peak_samples, bandwidth_samples: one a batch of cases, so that a busy machine shows.
        pair_samples: the same of products of bfloat16 pairs, 0 where the kernels have none.
    """

    threads: int
    source: str
    target: str = ""
    peak_samples: list[float] = field(default_factory=list)
    bandwidth_samples: list[float] = field(default_factory=list)
    pair_samples: list[float] = field(default_factory=list)

    @property
    def fma_peak(self) -> float:
        return max(self.peak_samples)

    @property
    def pair_peak(self) -> float:
        """Operations a second in products of bfloat16 pairs, 0 where there are none."""
        return max(self.pair_samples, default=0.0)

    @property
    def read_bandwidth(self) -> float:
        return max(self.bandwidth_samples)

    @property
    def was_busy(self) -> bool:
        """Whether a ceiling was much lower at some time of the run than at another."""
        pairs = ((self.peak_samples, self.fma_peak), (self.bandwidth_samples, self.read_bandwidth))
        return any(min(samples) < BUSY * best for samples, best in pairs)

    def sample(self) -> None:
        """Measure once more; the better number counts."""
        peak, bandwidth = _measurements(self.threads)
        self.peak_samples.append(peak())
        self.bandwidth_samples.append(bandwidth())
        self.pair_samples.append(_pair_peak(self.threads))


def measure(threads: int) -> Ceilings:
    """Ceilings of this machine with that many threads."""
    kernels = extension()
    source, target = STAND_IN, ""
    if kernels is not None:
        source, target = EXTENSION, _target() or kernels.targets()[0]
    ceilings = Ceilings(threads=threads, source=source, target=target)
    ceilings.sample()
    return ceilings


def _target() -> str:
    """The instruction set that the kernels use; the ceiling has to match it."""
    return os.environ.get(TARGET, "")


def _measurements(threads: int) -> tuple[Callable[[], float], Callable[[], float]]:
    kernels = extension()
    if kernels is None:
        return _matmul_rate, _sum_rate
    target = _target()
    return (
        lambda: float(kernels.fma_peak(threads, target=target)),
        lambda: float(kernels.read_bandwidth(threads, target=target)),
    )


def _pair_peak(threads: int) -> float:
    kernels = extension()
    return float(kernels.pair_peak(threads, target=_target())) if kernels is not None else 0.0


def _matmul_rate(size: int = 1024) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2.0 * size**3 / _best(lambda: torch.mm(a, b))


def _sum_rate(nbytes: int = 256 << 20) -> float:
    x = torch.ones(nbytes // 4)
    return nbytes / _best(x.sum)


def _best(call: Callable[[], object], times: int = 7) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
