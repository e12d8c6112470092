"""Rope parameters of a config that no model can run with: one sentence instead of NaN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from saccade.core import BadInput
from saccade.hf.foreign_errors import is_of_the_device
from saccade.hf.layers import text_config
from saccade.hf.rope_tables import pristine, rope_types, thresholds
from saccade.runtime.rope_options import configured_ropes


@contextmanager
def explained(config: PreTrainedConfig) -> Iterator[None]:
    """Inside a model is built; where that fails for its rope parameters, the error says so.

    Raises:
        BadInput: rope parameters with impossible values.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if getattr(text_config(config), "rope_parameters", None):
            try:
                configured_ropes(text_config(config), only_known=True)
            except (ValueError, TypeError) as why:
                raise BadInput(f"the rope_parameters of this model are no good: {why}") from error
        raise


def check_tables(modules: Iterable[nn.Module]) -> None:
    """Raise BadInput where rotary modules compute frequencies that are no numbers above 0."""
    for module in modules:
        for own in rope_types(module):
            for length in (1, *(2 * trained for trained in thresholds(module, own))):
                _check_table(module, own, length)


def _check_table(module: Any, own: str | None, length: int) -> None:
    try:
        found = _table(module, own, length)
    except RuntimeError as error:  # lists of divisors of another length
        if is_of_the_device(error):
            raise
        raise _bad(module, length, str(error).partition("\n")[0]) from error
    if found is None or found.is_meta:
        return
    if not bool((found.isfinite() & (found >= 0)).all()) or not bool(found.any()):
        raise _bad(module, length, f"{float(found.min())} to {float(found.max())}")


@torch.no_grad()
def _table(module: nn.Module, own: str | None, length: int) -> Tensor | None:
    """The frequencies of a layer type; those that follow the length are made by the module."""
    name = "inv_freq" if own is None else f"{own}_inv_freq"
    fresh = pristine(module)
    buffer = fresh._buffers.get(name)
    if buffer is not None and thresholds(module, own):
        at = torch.full((1, 1), length - 1, device=buffer.device)
        x = torch.zeros(1, 1, 2 * buffer.numel(), device=buffer.device)
        fresh(x, at) if own is None else fresh(x, at, own)
    return fresh._buffers.get(name)


def _bad(module: Any, length: int, got: str) -> BadInput:
    return BadInput(
        f"the rotary frequencies of a text of {length} tokens must be finite numbers of at least "
        f"0, one per pair, got {got} from rope_parameters {module.config.rope_parameters}. Write "
        "them as the model's own config does."
    )
