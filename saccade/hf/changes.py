"""What is different on a model object while it has runs, each change with what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.fused_layers import fused_forwards
from saccade.hf.layers import attention_modules
from saccade.hf.register import KEY, register
from saccade.hf.rope import Rotary, rotary_modules
from saccade.hf.runs import ModelRuns, Undo
from saccade.hf.settings import ATTRIBUTE

_ABSENT: Final = object()


def switch_attention(undo: Undo, runs: ModelRuns) -> None:
    """`set_attn_implementation("saccade")`; every config it touches is put back as it was."""
    register()
    set_implementation(undo, runs.model, KEY)


def set_implementation(undo: Undo, model: PreTrainedModel, name: str) -> None:
    """`set_attn_implementation(name)`; undone, every config that it touched is as it was.

    Raises:
        Unsupported: the model does not call transformers' attention interface.
    """
    switched = _SwitchedConfigs(model)
    undo.callback(switched.put_back)
    model.set_attn_implementation(name)
    switched.note()
    if model.config._attn_implementation != name:
        raise Unsupported(
            f"{type(model).__name__} does not call transformers' attention interface, so its "
            "attention cannot be replaced. Use a model class that supports attn_implementation."
        )


def name_implementation(undo: Undo, model: PreTrainedModel, name: str) -> None:
    """Only the name, in all configs: for "flash" in it transformers would look for a package."""
    switched = _SwitchedConfigs(model)
    undo.callback(switched.put_back)
    model.config._attn_implementation = name
    switched.note()


class _SwitchedConfigs:
    """The attributes of a model's configs that changed between `__init__` and `note`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._before = [(config, dict(vars(config))) for config in _configs(model)]
        self._changed: list[tuple[Any, str, Any]] | None = None

    def note(self) -> None:
        self._changed = self._different()

    def put_back(self) -> None:
        """Also where an interrupt came before `note`."""
        for config, name, old in self._different() if self._changed is None else self._changed:
            _put_back(config, name, old)

    def _different(self) -> list[tuple[Any, str, Any]]:
        """(config, attribute, what it was)."""
        return [
            (config, name, old)
            for config, values in self._before
            for name in vars(config).keys() | values.keys()
            if vars(config).get(name, _ABSENT) is not (old := values.get(name, _ABSENT))
        ]


def show_runs(undo: Undo, runs: ModelRuns) -> None:
    """Attention modules get a reference to the runs, to look up the settings in force."""
    for _, module in attention_modules(runs.model):
        override(undo, module, ATTRIBUTE, runs)


def dispatch_rotary(undo: Undo, runs: ModelRuns) -> None:
    """Rotary modules leave cos and sin to the run in force, if it scales positions."""
    for module in rotary_modules(runs.model):
        override(undo, module, "forward", _rotary_forward(module, module.forward, runs))


def _rotary_forward(
    module: nn.Module, original: Callable[..., Any], runs: ModelRuns
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        rotary: Rotary | None = runs.rotary().get(module)
        return original(*args, **kwargs) if rotary is None else rotary(*args, **kwargs)

    return forward


def fuse_layers(undo: Undo, runs: ModelRuns) -> None:
    """Modules of allowlisted classes run by fused kernels while the run in force enables them."""
    for module, forward in fused_forwards(runs.model, runs.fused):
        override(undo, module, "forward", forward)


def override(undo: Undo, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute; undone, the old one is back, or none where none was.

    An attribute that other code has replaced since stays as that code left it.
    """
    undo.callback(_restore, owner, name, vars(owner).get(name, _ABSENT), value)
    vars(owner)[name] = value


def _restore(owner: Any, name: str, old: Any, ours: Any) -> None:
    if vars(owner).get(name, _ABSENT) is ours:
        _put_back(owner, name, old)


def _put_back(owner: Any, name: str, old: Any) -> None:
    if old is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = old


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config of the model and of the models inside it, each once."""
    found: dict[int, Any] = {}
    waiting = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
            waiting += [part for part in nested if part is not None]
    return list(found.values())
