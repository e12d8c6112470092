"""Loading the model of a command, saying what had to be guessed or repaired."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel


def load(name: str) -> LoadedModel:
    """The model of `--model`, with its notes on stderr."""
    print(f"Loading {name} ...", file=sys.stderr, flush=True)
    from saccade.hf.load import load_model  # transformers comes with it and takes seconds

    loaded = load_model(name)
    for note in loaded.notes:
        print(f"Note: {note}", file=sys.stderr)
    return loaded
