"""Errors that are shown as one sentence instead of a traceback, and the sentence."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import typer

_EXTRAS = {
    "hf": ("transformers", "accelerate", "gguf", "safetensors", "tokenizers"),
    "report": ("matplotlib", "rich", "jinja2"),
}
_INSTALL = 'Run in the clone of saccade: pip install ".[hf,report]"'
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "unable to allocate",
    "bad_alloc",
)


class UsageError(Exception):
    """A command line that cannot be carried out; the text is the sentence to show."""


def sentence(error: Exception) -> str | None:
    """What to tell the user, or None where the error is a bug of ours."""
    if isinstance(error, typer.TyperException):
        return _not_understood(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing(error.name or "")
    if isinstance(error, ImportError) and raised_by_us(error):  # an old version of a package
        return _one_line(error)
    for cause in _causes(error):
        if _is_out_of_memory(cause):
            return (
                "not enough memory for this. Use a smaller --ctx-size or --context, a window, "
                f"a quantized cache, or a smaller model. ({_one_line(cause)})"
            )
    if isinstance(error, UsageError):
        return _one_line(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if not where and error.errno in _UNWRITTEN:  # files are named where they are written
            where = "what is printed cannot be written: "
        return f"{where}{error.strerror or _one_line(error)}."
    if isinstance(error, (ValueError, TypeError)):
        hint = "" if raised_by_us(error) else " (Run again with --traceback to see where.)"
        return _one_line(error) + hint
    return None


def bug(error: Exception) -> str:
    """What to tell the user of an error that nobody thought of."""
    return (
        f"this is a bug of saccade ({type(error).__name__}: {_one_line(error)}). Please report it; "
        "--traceback shows where it happened."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: a library may wrap the one that matters."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    system = isinstance(error, (RuntimeError, OSError))
    return system and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def _not_understood(error: Any) -> str:
    """What typer found wrong with a command line: the command, what is wrong, what to do."""
    context = getattr(error, "ctx", None)
    command = "saccade" if context is None else context.command_path
    known = getattr(context and context.command, "commands", None)
    advice = f"Run {command} --help for the options." if context else ""
    advice = f"There are {', '.join(known)}." if known else advice
    if hasattr(error, "possibilities"):  # an unknown option
        advice = f"Did you mean {error.possibilities[0]}?" if error.possibilities else advice
        return f"{command} has no option {error.option_name}. {advice}"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        argument = error.param.param_type_name == "argument"
        missing = "at least one is required." if argument else "this option is required."
        said = error.message.removeprefix("Value error, ") or missing
        name = str(error.param.metavar) if argument else "/".join(error.param.opts)
        return _one_line(f"{command}: {name}: {said}")
    said = error.format_message().rstrip(".")
    return _one_line(f"{command}: {said}" if said.endswith("?") else f"{command}: {said}. {advice}")


def need(*packages: str, purpose: str) -> None:
    """Raise UsageError unless the packages are installed; called before long work begins."""
    for package in packages:
        if find_spec(package) is None:
            raise UsageError(f"{purpose} needs the package {package}. {_INSTALL}")


def check_streams(*names: str) -> None:
    """Raise UsageError where the shell has closed stdout (or one of these): text is then lost."""
    for name in ("stdout", *names):
        if getattr(getattr(sys, name), "name", None) == os.devnull:  # main put it there
            raise UsageError(f"{name} is closed: expected a terminal, a file or a pipe there.")


def _missing(name: str) -> str | None:
    package = name.partition(".")[0]
    if package == "torch":
        return "PyTorch is not installed. See pytorch.org, or run: pip install torch"
    if any(package in packages for packages in _EXTRAS.values()):
        return f"this needs the package {package}. {_INSTALL}"
    return None


def _one_line(error: object) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


_LONGEST = 1200


def raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of this package made the error; one from deeper may be a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("saccade")
