"""Every attribute of a model, of its modules and of its configs, compared by identity."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def state_of(model: Any) -> dict[str, Any]:
    """Path -> object, dicts and lists (parameters, hooks, layer types) with their items."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        _note(found, path, module)
        if hasattr(module, "config"):
            _note_config(found, f"{path}.config", module.config)
    if model.generation_config is not None:
        _note(found, "generation_config", model.generation_config)
    return found


def _note(found: dict[str, Any], path: str, owner: Any) -> None:
    found[path] = owner
    for name, value in vars(owner).items():
        found[f"{path}.{name}"] = value
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(items, dict):
            found |= {f"{path}.{name}[{key}]": item for key, item in items.items()}


def _note_config(found: dict[str, Any], path: str, config: Any) -> None:
    _note(found, path, config)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _note_config(found, f"{path}.{name}", getattr(config, name))


def code_of_transformers() -> dict[str, Any]:
    """Every attribute of every loaded module of transformers, and of the classes in them."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "transformers" or module is None:
            continue
        for name, value in list(vars(module).items()):
            found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and issubclass(value, nn.Module):
                found |= {f"{module_name}.{name}.{k}": v for k, v in vars(value).items()}
    return found


def different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is new, gone or another object."""
    absent = object()
    names = before.keys() | after.keys()
    return sorted(n for n in names if before.get(n, absent) is not after.get(n, absent))
