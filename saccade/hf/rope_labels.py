"""What a session keeps of rotary positions: cached keys are good only under the same ones.

Two descriptions are compared: what the config says, as a rule where it is a known one and otherwise
as it stands, and a summary of the numbers that the rotary modules really compute with.
Neither refuses anything: a text was generated, and its session has to be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.hf.layers import text_config
from saccade.hf.rope import Rotary, ropes_in_force, rotary_tables


def rope_labels(model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]) -> dict[str, str]:
    """Descriptions of the rotary positions under `Run.rotary`, by name; empty without any."""
    tables = [_summary(*table) for table in rotary_tables(model, in_force)]
    numbers = {"rotary tables": "; ".join(tables)} if tables else {}
    return {**_stated(model, in_force), **numbers}


def _stated(model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]) -> dict[str, str]:
    """The rules in force by layer type, or `rope_parameters` where a part of it is not known."""
    try:
        ropes = ropes_in_force(model, in_force)
    except (ValueError, TypeError):
        return {"rope_parameters": normalised(text_config(model).rope_parameters)}
    return {f"rope of {kind or 'all'} layers": str(rope) for kind, rope in ropes.items()}


def normalised(value: Any) -> str:
    """A value of a config as JSON: keys in order, without those that hold None, numbers as floats.

    A number that JSON wrote as 2 and Python holds as 2.0 is the same number.
    """
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _summary(inv_freq: Tensor, magnitude: float) -> str:
    """Numbers that tell two tables apart, and survive another machine's last bit."""
    logs = inv_freq.double().cpu().clamp_min(1e-30).log()
    weights = torch.linspace(0, 1, len(logs), dtype=torch.float64)
    mean, slope = float(logs.mean()), float((logs * weights).mean())
    return f"{len(logs)} pairs, {mean:.4f}, {slope:.4f}, magnitude {magnitude:.4f}"
