"""A model saved as a folder of transformers: there as a whole, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from saccade.core import BadInput
from saccade.core.writing import writing_to
from saccade.hf.foreign_errors import quiet
from saccade.units import as_bytes

SHARD = "4GB"


def check_folder(path: Path, size: int = 0) -> None:
    """Raise BadInput unless a folder of so many bytes can be written there later."""
    if path.is_dir() and any(path.iterdir()):
        raise BadInput(f"the folder {path} is not empty, and is not overwritten. Name a new one.")
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file; expected the name of a new folder.")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder {path.parent} to write {path.name} into. Create it.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{path} cannot be written: no permission in {path.parent}.")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise BadInput(
            f"{path} takes at least {as_bytes(size)}, but {path.parent} has room for "
            f"{as_bytes(free)}. Name a folder on another disk."
        )


def save_folder(model: PreTrainedModel, tokenizer: Any | None, path: Path) -> int:
    """Write config, weights, generation config and tokenizer; the result is bytes on disk.

    All is written to a folder beside `path` and renamed at the end, so that an interrupt leaves
    nothing behind.

    Raises:
        BadInput: a folder that is not empty, or that cannot be made.
        OSError: no space, for example.
    """
    path = path.absolute()
    check_folder(path)
    with writing_to(path):
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with writing_to(path), quiet():
            try:
                model.save_pretrained(beside, max_shard_size=SHARD)
                if tokenizer is not None:
                    tokenizer.save_pretrained(beside)
            except Exception as error:  # safetensors raises errors of its own
                found = re.search(r"\(os error (\d+)\)", str(error))
                if found is None:
                    raise
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        size = sum(file.stat().st_size for file in beside.rglob("*"))
        beside.chmod(0o755)
        beside.replace(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return size
