"""A safetensors file that is replaced atomically, read once and checked by sha256.

The file is written under a name of its own, flushed to the disk and renamed, so a kill at any
moment leaves the old file as it was.  It is opened once and every tensor is read once, into memory
that nobody else can change, and compared with its checksum there: another save that replaces the
file meanwhile changes nothing.

A JSON record is stored in the metadata of safetensors, with a sha256 of every tensor (name, dtype
and shape included).  The record has a sha256 too, which finds damage, and a seal: an HMAC under a
key that is not in the file.  Whoever edits the file and repairs its checksums needs the key to
repair the seal.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import hmac
import json
import os
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.core.writing import writing_to
from saccade.runtime.tensor_header import DTYPES, TensorPlace, encoded, parsed

_RECORD: Final = "saccade.session"
_SUM: Final = "saccade.sha256"
_SEAL: Final = "saccade.seal"
VERSION: Final = 3
"""Of the record and the names of tensors; files of any other version are refused."""
_STALE_SECONDS: Final = 3600
"""A temporary file this old was left by a killed process: a save takes seconds."""
_LONGEST_NAME: Final = 200
"""Bytes of a file name up to which the temporary name can contain it (systems allow 255)."""


def write(
    path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any], *, key: bytes = b""
) -> None:
    """Replace `path` (links are followed) atomically by a file of these tensors and this record.

    One tensor at a time is copied to host memory.  The file is readable by its owner alone.

    Args:
        path: the file; a symbolic link is followed.
        tensors: by name, of the dtypes that safetensors supports.
        record: JSON.
        key: of the seal.

    Raises:
        OSError: no room or no permission, and where; the old file is untouched.
    """
    path = path.resolve()  # through a symbolic link, not over it
    sums = {name: _digest(name, tensor) for name, tensor in tensors.items()}
    text = json.dumps({**record, "version": VERSION, "checksums": sums}, default=_as_json)
    header = encoded(tensors, {_RECORD: text, _SUM: _sum(text), _SEAL: _sealed(text, key)})
    _remove_stale_parts(path)
    with writing_to(path):
        handle, name = tempfile.mkstemp(suffix=".part", prefix=_prefix(path), dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(header)
                for tensor in tensors.values():
                    file.write(_bytes(tensor))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


class SessionFile:
    """A file made by `write`; the checksum of the record is verified when it is opened.

    Raises:
        BadInput: truncated, damaged, of another version or not a session; the error says which.
        OSError: the file cannot be read.

    Attributes:
        record: the JSON record.
        names: of the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not a file object, which would warn about not being closed explicitly.
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        try:
            self._places, metadata = parsed(self._file)
        except ValueError as error:
            raise BadInput(
                f"{path} is not a complete session: it is truncated or not a session file "
                f"({error}). Expected a file written by saccade; delete it to start anew."
            ) from error
        self.names = list(self._places)
        self._text, self._seal = metadata.get(_RECORD, ""), metadata.get(_SEAL, "")
        self.record = _record(path, metadata)
        sums = self.record.get("checksums")
        if not isinstance(sums, dict) or list(sums) != self.names:
            raise _damaged(path, "its list of tensors is not the one it was saved with")
        self._sums = sums

    def check_seal(self, key: bytes) -> None:
        """Raise BadInput unless the record was sealed with this key."""
        if not hmac.compare_digest(self._seal.encode(), _sealed(self._text, key).encode()):
            raise _damaged(self._path, "its seal does not fit")

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor in memory.

        Raises:
            BadInput: its checksum does not fit.
        """
        place = self._places[name]
        data = torch.empty(place.stop - place.start, dtype=torch.uint8)
        if _read_into(self._file, place, data) < len(data):
            raise _damaged(self._path, f"{name} ends early")
        found = data.view(place.dtype).view(place.shape)
        if _digest(name, found) != self._sums[name]:
            raise _damaged(self._path, f"the checksum of {name} does not fit")
        return found

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of the name."""
        names = [name for name in self.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}


def _record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON record, after checking that it is ours, of this version, and undamaged."""
    text = metadata.get(_RECORD)
    if text is None:
        raise BadInput(
            f"{path} is a safetensors file, but no session of saccade. Give another file."
        )
    try:
        record = json.loads(text)
        version = int(record["version"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise _damaged(path, "its record cannot be read") from error
    if version != VERSION:
        raise _other_version(path, version)
    if _sum(text) != metadata.get(_SUM):
        raise _damaged(path, "the checksum of its record does not fit")
    return record


def _other_version(path: Path, version: int) -> BadInput:
    newer = version > VERSION
    advice = (
        "Upgrade saccade" if newer else "Delete it and read the prompt again, or use that saccade"
    )
    return BadInput(
        f"{path} was saved by {'a newer' if newer else 'an older'} saccade (session version "
        f"{version}, this one reads version {VERSION}). {advice} to continue it."
    )


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} was changed after it was saved: {why}. Use a copy, or delete it to start anew."
    )


def _as_json(value: Any) -> Any:
    """Numbers of numpy and torch as numbers; anything else as its text, so that nothing is lost."""
    return value.item() if hasattr(value, "item") else str(value)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sealed(text: str, key: bytes) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _digest(name: str, tensor: Tensor) -> str:
    described = f"{name} {DTYPES[tensor.dtype]} {list(tensor.shape)} "
    digest = hashlib.sha256(described.encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read_into(file: int, place: TensorPlace, data: Tensor) -> int:
    """Read a tensor's bytes -> how many there were."""
    target, done = data.numpy().data, 0
    os.lseek(file, place.start, os.SEEK_SET)
    while done < len(data):
        part = os.read(file, min(len(data) - done, 1 << 24))
        if not part:
            break
        target[done : done + len(part)] = part
        done += len(part)
    return done


def _prefix(path: Path) -> str:
    """How the temporary names of a file begin."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _remove_stale_parts(path: Path) -> None:
    for part in path.parent.glob(f"{glob.escape(_prefix(path))}*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
