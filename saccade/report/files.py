"""Files written atomically: they are complete or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from saccade.core.writing import writing_to


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside `path`, then rename over it; an interrupted write leaves the old file as it was.

    Raises:
        OSError: the folder does not exist or cannot be written; it names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing_to(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        beside = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            beside.chmod(0o644)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
