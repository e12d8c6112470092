"""The same few configurations at several lengths: memory, speed and quality by length.

Each point is one reading of its text.  What would need too much memory or time says so instead:
the time is estimated from the configuration's last length, as growing by the square of the length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from saccade.core import BadInput
from saccade.core.hardware import free_memory
from saccade.evals.applies import inapplicable
from saccade.evals.gpu_failure import end_if_failed, wait
from saccade.evals.measure import Trial, fill_divergence, fill_perplexity, measure
from saccade.evals.rounds import sentence
from saccade.evals.rows import FLASH, INT4, INT8, SDPA, SNAPKV, RowSpec, rows_for
from saccade.evals.speed import Rounds
from saccade.evals.trial import make_trial
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.report.comparison import Report, SweepPoint
from saccade.report.numbers import as_duration
from saccade.runtime import ContextParams
from saccade.runtime.auto_scaling import trained_reach
from saccade.runtime.memory import cache_bytes
from saccade.units import as_bytes

SCORED: Final = 128
STEPS: Final = 8
LEAST: Final = 256
LONGEST_SECONDS: Final = 180.0
"""No point is begun that is expected to take longer."""
WINDOW: Final = 1024
_COPIES: Final = 2.2
"""transformers' cache grows by concatenation: while it does, old and new keys are there."""


class Sweep:
    """Configurations times lengths.

    Args:
        tokens: the text; lengths: tokens of context, in any order, none for no sweep.
        scored: whether quality is measured too.

    Raises:
        BadInput: a length too short, or longer than the text.
    """

    def __init__(
        self,
        model: LoadedModel,
        runner: HFModel,
        tokens: Sequence[int],
        lengths: Sequence[int],
        *,
        n_batch: int,
        scored: bool = True,
    ) -> None:
        self._lengths = sorted(set(lengths))
        for length in self._lengths:
            _check(length, len(tokens))
        self._model, self._runner, self._tokens = model, runner, tokens
        self._n_batch, self._scored = n_batch, scored
        self._last: dict[str, tuple[int, float]] = {}  # configuration -> its last length, seconds

    @property
    def steps(self) -> int:
        """How many points there will be."""
        return sum(len(self._specs(length)) for length in self._lengths)

    def run(self, report: Report, step: Callable[[str], None], late: Callable[[], bool]) -> None:
        """Measure point after point into the report.

        Args:
            step: called with a label before each.
            late: whether no other point may begin.

        Raises:
            GPUFailed: nothing more can be measured.
        """
        for length in self._lengths:
            exact: Tensor | None = None
            for spec in self._specs(length):
                point = SweepPoint(name=spec.name, n_context=length)
                step(f"{spec.name} at {length:,} tokens")
                report.sweep.append(point)
                why = "there was no time left for it" if late() else self._too_much(spec, length)
                if why is not None:
                    point.status, point.note = "stopped", why
                    continue
                exact = self._measure(spec, point, exact)

    def stop(self, report: Report, why: str) -> None:
        """Put the points into the report that were not begun, and why they never are."""
        begun = {(point.name, point.n_context) for point in report.sweep}
        for length in self._lengths:
            for spec in self._specs(length):
                if (spec.name, length) not in begun:
                    report.sweep.append(SweepPoint(
                        name=spec.name, n_context=length, status="stopped", note=why
                    ))  # fmt: skip

    def _measure(self, spec: RowSpec, point: SweepPoint, exact: Tensor | None) -> Tensor | None:
        """One point; returns what the others at this length are compared with."""
        trial = self._trial(point.n_context)
        why = inapplicable(spec, trial.model.facts, point.n_context)
        if why is not None:
            point.status, point.note = "not applicable", why
            return exact
        rounds, begin = Rounds(), time.perf_counter()
        try:
            seen = measure(spec, trial, point, rounds)
            wait(self._runner.device)
        except KeyboardInterrupt:
            _empty(point, "stopped", "stopped before it was measured")
            raise
        except Exception as error:  # any model's own code runs here; finished points stay
            _empty(point, "failed", sentence(error))
            end_if_failed(self._runner.device, error)
            return exact
        self._last[spec.name] = point.n_context, time.perf_counter() - begin
        point.ttft_seconds = rounds.first[0]
        point.prefill_tps = point.n_context / rounds.prefill[0]
        point.decode_tps = 1 / rounds.decode[0] if rounds.decode else None
        if seen is None:
            return exact
        fill_perplexity(point, seen)
        inside = trial.total <= trained_reach(ContextParams(), trial.model.facts)
        if inside and exact is None and spec.name in (SDPA, FLASH):  # not all models have sdpa
            exact = seen.log_probs
        if exact is not None:
            fill_divergence(point, seen, exact)
        return exact

    def _specs(self, length: int) -> list[RowSpec]:
        """The configurations of the sweep, under names that are the same at every length."""
        facts, total = self._runner.facts, length + SCORED
        rows = rows_for(facts, n_context=length, total=total, n_batch=self._n_batch)
        named = {spec.name: spec for spec in rows.specs}
        found = [named[name] for name in (SDPA, FLASH, INT8, INT4, SNAPKV)]
        if rows.exact in named and rows.exact != SDPA:
            scaled = named[rows.exact]
            found.insert(2, _renamed(scaled, scaled.name.split(" x")[0]))
        window = ContextParams(n_batch=self._n_batch, n_swa=WINDOW, n_sinks=4)
        name = f"window {WINDOW} + 4 sinks"
        found.append(RowSpec(name=name, group="Sliding window", params=window))
        return found

    def _trial(self, length: int) -> Trial:
        trial = make_trial(
            self._model, self._runner, self._tokens, context=length, scored=SCORED, needles=0,
            steps=STEPS,
        )  # fmt: skip
        trial.scored = self._scored
        return trial

    def _too_much(self, spec: RowSpec, length: int) -> str | None:
        """Why a point is left out, or None."""
        if spec.name in self._last:
            before, seconds = self._last[spec.name]
            expected = seconds * (length / before) ** 2
            if expected > LONGEST_SECONDS:
                most = as_duration(LONGEST_SECONDS)
                return f"up to {as_duration(expected)} expected, the limit of a point is {most}"
        facts, total = self._runner.facts, length + SCORED
        kept = cache_bytes(facts, spec.params, [(total, 1)], reserve=total)
        needed = kept * (_COPIES if spec.theirs else 1.0)
        free = free_memory(self._runner.device)
        if needed > 0.9 * free:
            return f"its caches need about {as_bytes(needed)}, {as_bytes(free)} are free"
        return None


def _check(length: int, tokens: int) -> None:
    if length < LEAST:
        raise BadInput(f"a sweep needs lengths of at least {LEAST} tokens, got {length}.")
    if length + SCORED > tokens:
        raise BadInput(
            f"the text has {tokens:,} tokens, but a length of {length:,} and {SCORED} scored "
            f"tokens need {length + SCORED:,}. Give a longer text or shorter lengths."
        )


def _renamed(spec: RowSpec, name: str) -> RowSpec:
    return RowSpec(name=name, group=spec.group, params=spec.params)


def _empty(point: SweepPoint, status: str, note: str) -> None:
    """Take back what was filled in of a point that did not finish."""
    point.total_bytes = point.peak_bytes = point.cache_bytes = None
    point.status, point.note = status, note
