"""Options of a `generate` call, wherever they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def option(kwargs: Mapping[str, Any], name: str, model: Any = None) -> Any:
    """An argument, or the field of the config that is given or, by default, of the model's own."""
    config = kwargs.get("generation_config")
    if config is None:
        config = getattr(model, "generation_config", None)
    value = kwargs.get(name)
    return getattr(config, name, None) if value is None else value
