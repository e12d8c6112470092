"""Loading the model of a command, saying what had to be guessed or repaired."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.cli.failure import UsageError
from saccade.cli.notes import BUILD_KERNELS, Notes
from saccade.cli.shared_options import DTYPES, MODEL_HELP
from saccade.cli.stopping import DeferredStop

if TYPE_CHECKING:
    import torch

    from saccade.hf.load import LoadedModel
    from saccade.runtime import ContextParams, Model


_ARGUMENT = re.compile(r"""\b(device|weights|dtype)=["']?(\w+(?:[.:]\w+)*)["']?""")
_CHOICE = re.compile(r" or dtype=torch\.(\w+)")
_NAMED = re.compile(r"\b(leave|as) (device|weights|dtype)\b(?=,| out)")
_SHORT = {name: short for short, name in DTYPES.items() if name}


NAMES = ("smollm2",)
"""Those of `saccade.runtime.located`, known here before torch is imported."""


def check_model(name: str) -> None:
    """Raise UsageError where there is no such model: what follows imports for seconds."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            _check_folder(path)
        elif path.is_file():
            _check_file(path)
        elif name not in NAMES:
            raise UsageError(f"no model at {name!r}: expected {MODEL_HELP}.")
    except OSError as error:
        raise UsageError(f"--model {name[:200]} cannot be read: {error.strerror}.") from error


def _check_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    files = sorted(file.name for file in path.glob("*.gguf"))
    inside = f" It holds {', '.join(files[:3])}: name the file." if files else ""
    raise UsageError(
        f"the folder {path} has no config.json: expected a model saved by transformers "
        f"(save_pretrained), or a .gguf file.{inside}"
    )


def _check_file(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        found = f"it starts with {start!r} instead of b'GGUF'" if start else "it is empty"
        raise UsageError(f"{path} is not a GGUF file: {found}. Expected {MODEL_HELP}.")


def load(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "file",
    *,
    notes: Notes | None = None,
) -> LoadedModel:
    """The model of `--model` on `--device` in `--dtype`, with its notes on stderr.

    Args:
        weights: how they lie in memory (`--weights`).
    """
    notes = notes or Notes()
    check_placement(name, device, dtype, weights)
    notes.say(f"Loading {name} ...")
    import torch

    # Packages that are stopped in the middle of their import say that others are missing.
    with DeferredStop("Stopping once the packages are imported") as stop:
        from saccade.hf.load import load_model  # transformers comes with it and takes seconds
        from saccade.ops.attention.cpu.binding import extension
    stop.check()

    wanted = DTYPES[dtype]
    try:
        loaded = load_model(
            name,
            device=device,
            dtype=None if wanted is None else getattr(torch, wanted),
            weights=weights,
        )
    except ValueError as error:  # a device that is not there, say: in the words of the options
        raise UsageError(as_options(str(error))) from error
    for note in loaded.notes:
        notes.note(note)
    if extension() is None and loaded.model.device.type == "cpu":
        notes.note(f"the C++ kernels are not built: this runs many times slower. {BUILD_KERNELS}")
    return loaded


def check_placement(name: str, device: str, dtype: str, weights: str) -> torch.device:
    """The device that is meant.

    Raises:
        UsageError: one that is not there, or weights of a form that excludes the dtype.
    """
    import torch

    from saccade.runtime.placement import device_of, form_and_dtype

    wanted = DTYPES[dtype]
    own = None if wanted is None else getattr(torch, wanted)
    try:
        where = device_of(device)
        form_and_dtype(weights, own, where, is_folder=Path(name).expanduser().is_dir())
    except ValueError as error:
        raise UsageError(as_options(str(error))) from error
    return where


def say_check(model: Model, params: ContextParams, notes: Notes, *, reserve: int) -> None:
    """Say that a model is compared with its own attention, where a Context is going to do it.

    What a Context of these options would refuse without comparing is refused before.
    """
    from saccade.hf.check import comparisons
    from saccade.runtime import Context

    if comparisons(model, params):
        with Context(model, params, reserve=reserve):
            pass
        notes.say("Checking once that the model gives the same here as by its own attention ...")


def as_options(message: str) -> str:
    """A message about arguments of `load_model`, about options instead, and what they offer."""
    offered = _CHOICE.sub(lambda found: found[0] if found[1] in _SHORT else "", message)
    return _NAMED.sub(r"\1 --\2", _ARGUMENT.sub(_as_option, offered))


def _as_option(found: re.Match[str]) -> str:
    """`weights="int4"` as it is written on the command line: `--weights int4`."""
    return f"--{found[1]} {_SHORT.get(found[2].removeprefix('torch.'), found[2])}"
