"""Find the launch of each kernel and head dimension that is fastest on this GPU.

Each candidate first computes a small odd problem, which is compared with the reference, then the
problems to time, which have to agree with what the first right candidate made of them; a wrong one
is refused.  What does not fit the GPU's shared memory, or does not compile, is passed over.  The
launch in use now stays unless another one wins by more than timings move from run to run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache

import torch

from saccade.bench.tune_work import Problem, Result, Run, Work
from saccade.core import BadInput
from saccade.ops.tuning import files as launches
from saccade.ops.tuning import tables as tuning
from saccade.ops.tuning.files import Launch, LaunchFile

CANDIDATES = tuning.FOLDER.parent / "candidates.json"
SCHEMA = "saccade.candidates/1"
MARGIN = 0.03  # the same launch moves by that much from run to run
HOPELESS = 1.5  # times the best of the first problem: not measured on the others
AGREE = 2e-2  # relative distance of large results in 16 bits
FEW = 4  # candidates of a quick run
Timer = Callable[[Sequence[Run]], float]
"""Seconds of one of the runs, which compute the same over different memory."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A launch that was tried.

    Attributes:
        status: "ok", "WRONG" (refused), "cannot" (does not fit the GPU), "slow" or "failed".
        seconds: geometric mean over the problems, None where it was not timed on all of them.
        note: why, where the status is not "ok".
    """

    launch: Launch
    status: str
    seconds: float | None = None
    note: str = ""


@dataclass(slots=True)
class Found:
    """What was found for a kernel and a head dimension.

    Attributes:
        now: the launch in use before; best: the one to use, None where none was right.
        seconds_now, seconds: of each (geometric means over the problems).
    """

    kernel: str
    dim: int
    now: Launch
    trials: list[Trial] = field(default_factory=list[Trial])

    @property
    def seconds_now(self) -> float | None:
        return next((t.seconds for t in self.trials if t.launch == self.now), None)

    @property
    def best(self) -> Trial | None:
        """The fastest, or the one in use where nothing is clearly faster."""
        timed = [trial for trial in self.trials if trial.seconds is not None]
        if not timed:
            return None
        fastest = min(timed, key=lambda trial: trial.seconds or 0.0)
        now = next((trial for trial in timed if trial.launch == self.now), None)
        if now is not None and now.seconds is not None and fastest.seconds is not None:
            return now if fastest.seconds > (1 - MARGIN) * now.seconds else fastest
        return fastest


def tune(found: Found, make: Callable[[], Work], tried: Sequence[Launch], timer: Timer) -> None:
    """Try the launch in use and every one of `tried`; the results go into `found` one by one."""
    work = make()
    kernel = tuning.KERNELS[found.kernel]
    standards: list[Result | None] = [None] * len(work.large)
    problems: list[Problem | None] = [None] * len(work.large)
    best: float | None = None
    for launch in dict.fromkeys((found.now, *tried)):
        with tuning.trial(kernel, launch):
            trial = _tried(launch, work, problems, standards, timer, best)
        found.trials.append(trial)
        if trial.seconds is not None:
            best = min(trial.seconds, best or math.inf)


def _tried(
    launch: Launch,
    work: Work,
    problems: list[Problem | None],
    standards: list[Result | None],
    timer: Timer,
    best: float | None,
) -> Trial:
    """One launch: checked, compared, then timed on every problem."""
    taken: list[float] = []
    try:
        wrong = check(work.small)
        if wrong:
            return Trial(launch, "WRONG", note=wrong)
        for at, make in enumerate(work.large):
            problem = problems[at] = problems[at] or make()
            wrong = _compare(problem, standards, at)
            if wrong:
                return Trial(launch, "WRONG", note=wrong)
            taken.append(timer(problem.runs))
            if best is not None and len(work.large) == 1 and taken[0] > HOPELESS * best:
                return Trial(launch, "slow", note=f"{taken[0] / best:.1f} times the best")
    except Exception as error:  # a launch that breaks down must not end the run
        note = " ".join(str(error).split())[:200] or type(error).__name__
        _still_alive(error)
        return Trial(launch, "cannot" if _does_not_fit(error) else "failed", note=note)
    return Trial(launch, "ok", math.exp(math.fsum(map(math.log, taken)) / len(taken)))


def check(problem: Problem) -> str:
    """What is wrong with the results of a problem that is judged, "" where nothing is."""
    assert problem.expected is not None
    results = [part for run in problem.runs for part in run()]
    for expected, got in zip(problem.expected, results, strict=True):
        verdict = expected.judge(got)
        if not verdict.passed:
            return verdict.reason
    return ""


def _compare(problem: Problem, standards: list[Result | None], at: int) -> str:
    """Agreement of a large result with the one of the first right launch."""
    result = problem.runs[0]()
    standard = standards[at]
    if standard is None:
        standards[at] = tuple(x.clone() for x in result)
        return "" if all(bool(x.isfinite().all()) for x in result) else "not finite"
    for ours, theirs in zip(result, standard, strict=True):
        apart = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not apart < AGREE:
            return f"a large result is {apart:.2g} away from that of another launch"
    return ""


def _does_not_fit(error: Exception) -> bool:
    """Whether Triton raised because a launch needs more resources than the GPU has."""
    return type(error).__name__ in ("OutOfResources", "OutOfMemoryError", "PTXASError")


def _still_alive(error: Exception) -> None:
    """Raise where the GPU can no longer be used by this process, after an illegal access."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as broken:
            raise BrokenGPU(" ".join(str(error).split())[:200]) from broken


class BrokenGPU(RuntimeError):
    """A launch left the GPU in a state in which only a new process can use it."""


@cache
def _candidates() -> dict[str, list[tuple[tuple[int, int], Launch]]]:
    try:
        data = json.loads(CANDIDATES.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f'expected "schema": "{SCHEMA}"')
        return {
            name: [
                (
                    (row["dims"][0], row["dims"][1]),
                    launches.parse_launch({k: v for k, v in row.items() if k != "dims"}),
                )
                for row in rows
            ]
            for name, rows in data["kernels"].items()
        }
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(f"{CANDIDATES} is not a list of candidates: {error}.") from error


def candidates(kernel: str, dim: int, *, quick: bool = False) -> list[Launch]:
    """Launches to try for a kernel and a head dimension, the most promising first."""
    found = [launch for (low, high), launch in _candidates()[kernel] if low <= dim <= high]
    return found[:FEW] if quick else found


def enter(file: LaunchFile, found: Found) -> None:
    """Put what was found into a file: the row to use, and how it was found."""
    if found.best is not None:
        rows = file.kernels.get(found.kernel, ())
        file.kernels[found.kernel] = launches.overlay(rows, ((found.dim, found.best.launch),))
    for trial in found.trials:
        entry = {"kernel": found.kernel, "dim": found.dim, "status": trial.status}
        entry |= {"seconds": trial.seconds} if trial.seconds is not None else {}
        entry |= {"note": trial.note} if trial.note else {}
        file.trials.append(entry | asdict(trial.launch))


def has_row(file: LaunchFile, kernel: str, dim: int) -> bool:
    """Whether a file holds a measured row of that kernel and head dimension."""
    return any(limit == dim for limit, _ in file.kernels.get(kernel, ()))
