"""The bytes of a weight file, mapped into memory and dropped from it once they are read."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FileMap:
    """A file of which only what is being read is in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and so writable, which torch wants of an array; it is never written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def at(self, offset: int, n_bytes: int) -> Tensor:
        """uint8 `[n_bytes]`, a view of the file."""
        return torch.from_numpy(self._bytes[offset : offset + n_bytes])

    def drop(self, offset: int, n_bytes: int) -> None:
        """Let go of pages; they are read again if they are needed again."""
        if hasattr(self._map, "madvise"):  # not on Windows
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + n_bytes - start)


class FileMaps:
    """The maps of several files, each made once."""

    def __init__(self) -> None:
        self._maps: dict[Path, FileMap] = {}

    def __getitem__(self, path: Path) -> FileMap:
        if path not in self._maps:
            self._maps[path] = FileMap(path)
        return self._maps[path]
