"""RoPE of a loaded model: the rotary tables of a run, and the frequencies in force.

A run that scales positions has a ScaledRotary for each rotary module, and one whose tables follow
the length of the text a FittedRotary; `saccade.hf.runs` calls them in place of the module's forward
while that run is in force.  The modules themselves are not replaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.layers import text_config
from saccade.hf.rope_config import check_tables
from saccade.hf.rope_tables import FittedRotary, follows_length, pristine, reached, reaching
from saccade.hf.scaled_rotary import ScaledRotary, scaled_rotary
from saccade.rope import Frequencies, ParsedRope
from saccade.runtime.params import ContextParams
from saccade.runtime.rope_options import asks_for_rope, configured_ropes

Rotary = ScaledRotary | FittedRotary | nn.Module
"""What computes cos and sin: ours, or a rotary module of transformers."""


def run_rotary(model: PreTrainedModel, params: ContextParams) -> dict[nn.Module, Rotary]:
    """Rotary module -> what a run under these params calls instead; empty for the model's own.

    Raises:
        Unsupported: a model without rotary modules, or with some of a kind not known here.
        ValueError: options that do not fit together, or a scaling factor that nothing gives.
        BadInput: a config whose rope parameters give no frequencies.
    """
    modules = list(rotary_modules(model))
    check_tables(modules)
    if not asks_for_rope(params):
        return {module: FittedRotary(module) for module in modules if follows_length(module)}
    if not modules:
        raise Unsupported(
            f"rope options were given, but {type(model).__name__} has no rotary positions that "
            "could be scaled. Leave rope_* and yarn_* unset for this model."
        )
    text = text_config(model)  # a model with several rotary modules gives each a config of its own
    return {m: scaled_rotary(m, getattr(m, "config", text), params) for m in modules}


def rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The rotary modules of the decoder; those of a vision tower have no rope_type."""
    for module in model.modules():
        if hasattr(module, "rope_type") and any("inv_freq" in name for name in module._buffers):
            yield module


def table_key(rotary: Iterable[Rotary], length: int) -> Hashable:
    """Equal for two lengths of a text that have the same tables under `Run.rotary`."""
    return tuple(r.table_key(length) for r in rotary if isinstance(r, ScaledRotary | FittedRotary))


def follow_length(rotary: Iterable[Rotary]) -> bool:
    """Whether any of the tables of a run changes with the length of the text."""
    ours = (module for module in rotary if isinstance(module, ScaledRotary | FittedRotary))
    return any(module.follows_length for module in ours)


def last_length(rotary: Iterable[Rotary]) -> int | None:
    """Largest position of the last call plus 1, where any table depends on it; else None."""
    for module in rotary:
        if isinstance(module, ScaledRotary | FittedRotary) and module.follows_length:
            return None if module.positions is None else int(module.positions.max()) + 1
    return None


def first_rotary(model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]) -> Rotary:
    """What computes cos and sin in the text decoder under `Run.rotary` of the run in force.

    Raises:
        Unsupported: a model without rotary modules.
    """
    for module in rotary_modules(model):
        return in_force.get(module, module)
    raise Unsupported(f"{type(model).__name__} has no rotary positions.")


def frequencies_of(rotary: Rotary, layer_type: str | None = None) -> Frequencies:
    """The frequencies of a layer type, float64 on the CPU."""
    if isinstance(rotary, ScaledRotary):
        return rotary.frequencies(layer_type if layer_type in rotary.ropes else None)
    rotary = rotary.asked() if isinstance(rotary, FittedRotary) else rotary
    prefix = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq").double().cpu()
    return Frequencies(inv_freq, float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))


def table_length(rotary: Iterable[Rotary], seen: int, before: int | None) -> int | None:
    """The length whose tables all keys of a cache have, after a call that adds some.

    Args:
        rotary: those in force; seen: tokens in the cache; before: the length of their tables.

    Raises:
        Unsupported: the new keys have other tables than those in the cache.
    """
    rotary = tuple(rotary)
    length = reached() or last_length(rotary)
    if length is None or not seen or before is None:
        return length
    if table_key(rotary, length) == table_key(rotary, before):
        return before
    raise Unsupported(
        "the rotary tables of this model change with the length of the text: the cache holds keys "
        f"of a text of {before} tokens, and this call reaches {length}. Read the whole text in one "
        "call with an empty cache, or use saccade.Context, which reads it again where it has to."
    )


def ropes_in_force(
    model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]
) -> dict[str | None, ParsedRope]:
    """Base and scaling rule of each layer type, or of all under None; empty without RoPE."""
    config = text_config(model)
    if not any(rotary_modules(model)) or not getattr(config, "rope_parameters", None):
        return {}
    rotary = first_rotary(model, in_force)
    return rotary.ropes if isinstance(rotary, ScaledRotary) else configured_ropes(config)


def rotary_tables(
    model: nn.Module, in_force: Mapping[nn.Module, Rotary], length: int | None = None
) -> list[Frequencies]:
    """What every rotary module computes with, for a text of `length` tokens."""
    found: list[Frequencies] = []
    for module in model.modules():
        if any(name.endswith("inv_freq") for name in module._buffers):
            found += reaching(length, _tables_of, in_force.get(module, module), length)
    return found


def _tables_of(rotary: Rotary, length: int | None) -> list[Frequencies]:
    if isinstance(rotary, ScaledRotary):
        return [rotary.frequencies(kind, length) for kind in rotary.ropes]
    module = rotary.asked() if isinstance(rotary, FittedRotary) else pristine(rotary)
    found: list[Frequencies] = []
    for name, buffer in module._buffers.items():
        if name.endswith("inv_freq") and buffer is not None and buffer.dim() == 1:
            magnitude = getattr(module, f"{name.removesuffix('inv_freq')}attention_scaling", 1.0)
            found.append(Frequencies(buffer.double().cpu(), float(magnitude)))
    return found


def distinct_frequencies(tables: Iterable[Frequencies]) -> list[Tensor]:
    """The frequencies `[R/2]` of the tables, each once."""
    kept: list[Tensor] = []
    for inv_freq, _ in tables:
        if not any(torch.equal(inv_freq, other) for other in kept):
            kept.append(inv_freq)
    return kept
