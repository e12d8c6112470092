"""What transformers, safetensors and torch raise about a file, as one sentence about the file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
import transformers
from transformers.utils import logging

from saccade.core import BadInput

_LONGEST: Final = 400
_NO_MEMORY: Final = (
    "can't allocate memory",
    "not enough memory",
    "Unable to allocate",
    "bad_alloc",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def as_bad_input(path: Path) -> Iterator[None]:
    """Whatever is said about a file that cannot be loaded, as `BadInput` with the reason.

    Raises:
        BadInput: any error but one of memory.
        MemoryError: the weights need more than there is.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # a dozen types come out of there
        if is_out_of_memory(error):
            raise MemoryError(
                f"there is not enough memory to load {path}: {reason(error)}. Load it with a "
                "smaller dtype, or a smaller model."
            ) from error
        raise BadInput(
            f"{path} could not be loaded by transformers {transformers.__version__}: "
            f"{reason(error)}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the file may be fine and the machine too small."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(t in str(error) for t in _NO_MEMORY)


def is_of_the_device(error: Exception) -> bool:
    """Whether a device failed or has no memory left, which says nothing of what it computed."""
    failed = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return failed or is_out_of_memory(error)


def reason(error: Exception) -> str:
    """The text of an error on one line; its type where it has none.

    Validation errors say which field is wrong on their first line and why on the next ones.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | IndexError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
