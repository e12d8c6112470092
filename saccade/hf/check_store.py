"""Self-checks that passed, remembered in the user's cache folder: each is made once.

A check counts for one model class, config, dtype, device and set of options, and for the versions
of saccade, torch and transformers that it was made with.  Weights do not matter to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from transformers import PreTrainedModel

from saccade.core.user_cache import user_cache
from saccade.version import __version__

_BOOKKEEPING: Final = ("_name_or_path", "transformers_version", "_attn_implementation")
_passed: Final[set[str]] = set()
"""Keys of checks that passed in this process, where the folder cannot be written to."""


def has_passed(model: PreTrainedModel, options: str) -> bool:
    """Whether this check was made before, here or in another process, and passed."""
    key = _key(model, options)
    return key in _passed or key in _read(_file(model))


def remember(model: PreTrainedModel, options: str) -> None:
    """Note that a check passed; where the folder cannot be written, for this process alone."""
    key, path = _key(model, options), _file(model)
    _passed.add(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(path) | {key: options}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                json.dump(known, file, indent=1)
                file.flush()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def _read(path: Path) -> dict[str, str]:
    """Key -> options of the checks in a file; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        found: Any = json.loads(path.read_text())
        if isinstance(found, dict):
            return cast(dict[str, str], found)
    return {}


def _file(model: PreTrainedModel) -> Path:
    return user_cache("checks") / f"{type(model).__name__}.json"


def _key(model: PreTrainedModel, options: str) -> str:
    """sha256 of everything that the result of a check depends on."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _BOOKKEEPING}
    device = model.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = [
        f"{type(model).__module__}.{type(model).__qualname__}",
        json.dumps(config, sort_keys=True, default=str),
        f"{model.dtype} on {named}",
        f"saccade {__version__} {_installed()} torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        options,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _installed() -> int:
    """Changes when a file of the package does: a check of other code says nothing."""
    files = Path(__file__).parents[1].rglob("*.py")
    return max(file.stat().st_mtime_ns for file in files)
