"""Loading the model of a command, saying what had to be guessed or repaired."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from saccade.cli.failure import UsageError
from saccade.cli.notes import Notes
from saccade.cli.shared_options import DTYPES

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel


_DEVICE = re.compile(r"""\bdevice=["']([\w:]+)["']""")


def load(
    name: str, device: str = "auto", dtype: str = "auto", *, notes: Notes | None = None
) -> LoadedModel:
    """The model of `--model` on `--device` in `--dtype`, with its notes on stderr."""
    notes = notes or Notes()
    notes.say(f"Loading {name} ...")
    import torch

    from saccade.core import BadInput
    from saccade.hf.load import load_model  # transformers comes with it and takes seconds

    wanted = DTYPES[dtype]
    try:
        loaded = load_model(
            name, device=device, dtype=None if wanted is None else getattr(torch, wanted)
        )
    except BadInput as error:  # of a device that is not there, say: in the words of the options
        raise UsageError(_DEVICE.sub(r"--device \1", str(error))) from error
    for note in loaded.notes:
        notes.note(note)
    return loaded
