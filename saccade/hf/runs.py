"""Runs: the options of each caller of a model, and the changes to its modules that they share.

A Run holds the options of one caller.  They are stored in the caches that it makes, never on the
model object.  The changes that the model object does need (the attention implementation, a
`forward` that looks up the run in force) are the same for all runs.  Each is made when the first
run that needs it begins, and undone when the last such run ends: runs of one model may be
interleaved and end in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.rope import Rotary
from saccade.hf.scaled_rotary import ScaledRotary
from saccade.hf.settings import ATTRIBUTE, DEFAULT, AttentionSettings, LayerSettings
from saccade.rope import ParsedRope
from saccade.runtime.params import ContextParams

Change = Callable[[ExitStack, "ModelRuns"], None]
"""Changes a model object and leaves on the stack what puts everything back."""

_LOCK: Final = RLock()
_activated: ContextVar[Run | None] = ContextVar("saccade_run", default=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One caller's options for one model.

    Attributes:
        settings: of each attention layer.
        rotary: rotary module -> its replacement for cos and sin; empty for the model's own.
        fused: whether norms, linear layers, MLPs and decoder layers run by fused kernels.
        serves_every_call: whether it is in force for all calls of the model (`attach`), or only
            for those inside `activated` (`Context`).
        changes: by name, what has to be different on the model object.
    """

    model: PreTrainedModel
    params: ContextParams
    settings: LayerSettings
    rotary: Mapping[nn.Module, Rotary]
    fused: bool
    serves_every_call: bool
    changes: Mapping[str, Change] = field(repr=False)

    @property
    def ropes(self) -> dict[nn.Module, dict[str | None, ParsedRope]]:
        """The scaling of each rotary module; empty for the model's own."""
        return {m: r.ropes for m, r in self.rotary.items() if isinstance(r, ScaledRotary)}


class ModelRuns:
    """The runs of one model that have begun and not ended, and the changes they share."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._begun: list[Run] = []
        self._undo: dict[str, ExitStack] = {}

    def __deepcopy__(self, memo: Any) -> ModelRuns:
        """A copy of the model shares the runs of the original."""
        return self

    @property
    def in_force(self) -> Run | None:
        """The run whose options apply: the activated one, else the newest for every call."""
        run = _activated.get()
        if run is not None and run in self._begun:
            return run
        serving = [run for run in self._begun if run.serves_every_call]
        return serving[-1] if serving else None

    def settings(self, layer: int) -> AttentionSettings:
        """Settings of a layer that was called without one of our caches."""
        run = self.in_force
        return DEFAULT if run is None else run.settings[layer]

    def rotary(self) -> Mapping[nn.Module, Rotary]:
        """What computes cos and sin in place of rotary modules."""
        run = self.in_force
        return {} if run is None else run.rotary

    def fused(self) -> bool:
        """Whether the run in force has fused layers on."""
        run = self.in_force
        return run is not None and run.fused

    def begin(self, run: Run) -> None:
        """Make the changes that no other run has made yet; on an error none of them stays."""
        with ExitStack() as failed:
            failed.callback(self._undo_unused)
            self._begun.append(run)
            failed.callback(self._begun.remove, run)
            for name, change in run.changes.items():
                if name not in self._undo:
                    self._undo[name] = _made(change, self)
            failed.pop_all()

    def end(self, run: Run) -> None:
        """Undo the changes that no other run needs."""
        self._begun.remove(run)
        self._undo_unused()

    def _undo_unused(self) -> None:
        needed = {name for run in self._begun for name in run.changes}
        with ExitStack() as undo:
            for name in [name for name in self._undo if name not in needed]:
                undo.push(self._undo.pop(name))

    @property
    def ended(self) -> bool:
        """Whether no run is left."""
        return not self._begun


def _made(change: Change, runs: ModelRuns) -> ExitStack:
    """What undoes a change that was made; one that fails half way is undone here."""
    with ExitStack() as undo:
        change(undo, runs)
        return undo.pop_all()


@contextmanager
def begun(run: Run) -> Iterator[None]:
    """The model, ready for this run inside the `with`; it need not be the innermost to end.

    Raises:
        Unsupported: the model cannot be changed as the run needs.
    """
    with _LOCK, ExitStack() as undo:
        runs = _runs_of(undo, run.model)
        runs.begin(run)
        undo.pop_all()
    try:
        yield
    finally:
        with _LOCK, ExitStack() as undo:
            undo.callback(_forget_if_ended, runs)
            runs.end(run)


@contextmanager
def activated(run: Run | None) -> Iterator[None]:
    """Inside, what this thread computes with the model of the run is computed under its options."""
    token = _activated.set(run)
    try:
        yield
    finally:
        _activated.reset(token)


def run_in_force(model: nn.Module) -> Run | None:
    """The run whose options apply to a model now, None for none."""
    runs: ModelRuns | None = vars(model).get(ATTRIBUTE)
    return None if runs is None else runs.in_force


def _runs_of(undo: ExitStack, model: PreTrainedModel) -> ModelRuns:
    """The runs of a model, kept on the model object itself from the first to the last."""
    found: ModelRuns | None = vars(model).get(ATTRIBUTE)
    if found is not None:
        return found
    for module in model.modules():
        other: ModelRuns | None = vars(module).get(ATTRIBUTE)
        if other is not None:
            raise Unsupported(
                f"a part of this {type(model).__name__} is attached already, as a "
                f"{type(other.model).__name__} of its own: leave that attach first, or attach the "
                "same object again."
            )
    runs = ModelRuns(model)
    undo.callback(_forget_if_ended, runs)
    setattr(model, ATTRIBUTE, runs)
    return runs


def _forget_if_ended(runs: ModelRuns) -> None:
    if runs.ended:
        vars(runs.model).pop(ATTRIBUTE, None)
