"""Runs: the options of each caller of a model, and the changes to its modules that they share.

A Run holds the options of one caller.  They are stored in the caches that it makes, never on the
model object.  The changes that the model object does need (the attention implementation, a
`forward` that looks up the run in force) are the same for all runs.  Each is made when the first
run that needs it begins, and undone when the last such run ends: runs of one model may be
interleaved and end in any order.

Ctrl-C may arrive at any instruction.  What undoes a change is therefore noted before the change is
made, and undoing may be repeated: where it was broken off it is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, local
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

from torch import nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.register import KEY
from saccade.hf.rope import Rotary
from saccade.hf.scaled_rotary import ScaledRotary
from saccade.hf.settings import ATTRIBUTE, DEFAULT, AttentionSettings, LayerSettings
from saccade.rope import ParsedRope
from saccade.runtime.params import ContextParams

R = TypeVar("R")
P = ParamSpec("P")
Change = Callable[["Undo", "ModelRuns"], None]
"""Changes a model object and notes beforehand what puts everything back."""

_LOCK: Final = RLock()
_thread: Final = local()  # .run is the activated one; torch.compile cannot read a ContextVar


class Undo:
    """What puts a model back, in steps that may be repeated."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def callback(self, step: Callable[..., None], *args: Any) -> None:
        """Note a step, before what it undoes is done."""
        self._steps.append(partial(step, *args))

    def run(self) -> None:
        """All steps, the newest first; the first error is raised behind the last of them."""
        failed: BaseException | None = None
        for step in reversed(self._steps):
            try:
                step()
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed


def surely(step: Callable[[], None]) -> None:
    """A step that may be repeated; where an interrupt broke it off it is done once more."""
    try:
        step()
    except BaseException:
        step()
        raise


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
        self._undo: dict[str, Undo] = {}

    def __reduce__(self) -> NoReturn:
        """For copy, pickle and torch.save, which would take the replaced methods along.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            f"this {type(self.model).__name__} cannot be copied or pickled while it is attached or "
            "a Context is open: its replaced methods would still use the original's weights. Copy "
            "it before or afterwards; save_pretrained() and state_dict() work inside."
        )

    @property
    def in_force(self) -> Run | None:
        """The run whose options apply: the activated one, else the newest for every call."""
        run: Run | None = getattr(_thread, "run", None)
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
        """Make the changes that no other run has made yet; after an error call `end`."""
        self._begun.append(run)
        for name, change in run.changes.items():
            if name not in self._undo:
                self._undo[name] = undo = Undo()
                change(undo, self)

    def begin_within(self, undo: Undo, run: Run) -> None:
        """`begin` a run that ends when the change that `undo` belongs to is undone."""

        def end() -> None:
            if run in self._begun:  # undoing a change of this run may come back here
                self.end(run)

        with _LOCK:
            undo.callback(end)
            self.begin(run)

    def end(self, run: Run) -> None:
        """Undo the changes that no other run needs.  Harmless to repeat."""
        if run in self._begun:
            self._begun.remove(run)
        needed = {name for run in self._begun for name in run.changes}
        for name, undo in list(self._undo.items()):
            if name not in needed:
                undo.run()
                self._undo.pop(name, None)

    @property
    def ended(self) -> bool:
        """Whether no run is left."""
        return not self._begun


class Running:
    """`with Running(run):` the model is ready for this run; it need not be the innermost to end.

    Raises:
        Unsupported: the model cannot be changed as the run needs.
    """

    run: Run | None = None

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> object:
        try:
            assert self.run is not None
            with _LOCK:
                _runs_of(self.run.model).begin(self.run)
            _check_attention(self.run.model)
        except BaseException:
            surely(self.end)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        surely(self.end)

    def __del__(self) -> None:
        """For an interrupt between the steps of the `with` statement itself."""
        surely(self.end)

    def end(self) -> None:
        """Undo what no other run needs.  Harmless to repeat."""
        if self.run is None:
            return
        runs: ModelRuns | None = vars(self.run.model).get(ATTRIBUTE)
        if runs is not None:
            with _LOCK:
                runs.end(self.run)
                if runs.ended:
                    vars(runs.model).pop("__reduce_ex__", None)
                    vars(runs.model).pop(ATTRIBUTE, None)


def _check_attention(model: PreTrainedModel) -> None:
    implementation = model.config._attn_implementation
    if implementation != KEY:
        raise Unsupported(
            f"the attention implementation of this {type(model).__name__} was set to "
            f"{implementation!r} while it was attached. Leave the outer attach or Context, or "
            f'call set_attn_implementation("{KEY}") first.'
        )


def activated(run: Run | None, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """`call(*args, **kwargs)`; what this thread computes with the run's model has its options.

    Python handles no signal between the end of the call and the line that puts the old run back,
    which it does between the steps of a `with` statement.
    """
    before: Run | None = getattr(_thread, "run", None)
    try:
        _thread.run = run
        return call(*args, **kwargs)
    finally:
        _thread.run = before


def run_in_force(model: nn.Module) -> Run | None:
    """The run whose options apply to a model now, None for none."""
    runs: ModelRuns | None = vars(model).get(ATTRIBUTE)
    return None if runs is None else runs.in_force


def _runs_of(model: PreTrainedModel) -> ModelRuns:
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
    vars(model)[ATTRIBUTE] = runs = ModelRuns(model)
    vars(model)["__reduce_ex__"] = runs.__reduce_ex__  # copy and pickle ask the object first
    return runs
