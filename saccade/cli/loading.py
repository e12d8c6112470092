"""Loading the model of a command, saying what had to be guessed or repaired."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from saccade.cli.failure import UsageError
from saccade.cli.notes import Notes
from saccade.cli.shared_options import DTYPES

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel


_ARGUMENT = re.compile(r"""\b(device|weights|dtype)=["']?(\w+(?:[.:]\w+)*)["']?""")
_CHOICE = re.compile(r" or dtype=torch\.(\w+)")
_NAMED = re.compile(r"\b(leave|as) (device|weights|dtype)\b(?=,| out)")
_SHORT = {name: short for short, name in DTYPES.items() if name}


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
    notes.say(f"Loading {name} ...")
    import torch

    from saccade.hf.load import load_model  # transformers comes with it and takes seconds

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
    return loaded


def as_options(message: str) -> str:
    """A message about arguments of `load_model`, about options instead, and what they offer."""
    offered = _CHOICE.sub(lambda found: found[0] if found[1] in _SHORT else "", message)
    return _NAMED.sub(r"\1 --\2", _ARGUMENT.sub(_as_option, offered))


def _as_option(found: re.Match[str]) -> str:
    """`weights="int4"` as it is written on the command line: `--weights int4`."""
    return f"--{found[1]} {_SHORT.get(found[2].removeprefix('torch.'), found[2])}"
