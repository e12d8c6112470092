"""A safetensors file that is replaced atomically and checked by sha256.

The file is written under a temporary name, flushed to the disk and renamed, so a kill at any moment
leaves the old file as it was.  A JSON record is stored in the metadata of safetensors, with a
sha256 of every tensor (dtype and shape included) and of the record itself.  The checksums find
damage; they are no signature, because anybody can compute them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from saccade.core import BadInput

_RECORD: Final = "saccade.session"
_SUM: Final = "saccade.sha256"
VERSION: Final = 2
"""Of the record and the names of tensors; files of any other version are refused."""
_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STALE_SECONDS: Final = 3600
"""A temporary file this old was left by a killed process: a save takes seconds."""


def write(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Replace `path` (links are followed) atomically by a file of these tensors and this record.

    One tensor at a time is copied to host memory.  The file is readable by its owner alone.

    Args:
        path: the file; a symbolic link is followed.
        tensors: by name, of the dtypes that safetensors supports.
        record: JSON.

    Raises:
        OSError: no room or no permission; the old file is untouched.
    """
    path = path.resolve()  # through a symbolic link, not over it
    sums = {name: _digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**record, "version": VERSION, "checksums": sums}, sort_keys=True)
    header = _header(tensors, {_RECORD: text, _SUM: hashlib.sha256(text.encode()).hexdigest()})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove_stale_parts(path)
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
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
    """A file made by `write`; every checksum is verified when it is opened.

    Raises:
        BadInput: truncated, damaged, of another version or not a session; the error says which.
        OSError: the file cannot be read.

    Attributes:
        record: the JSON record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb"):  # a missing file is an OSError, whatever safetensors makes of it
            pass
        with self._open() as file:
            self.record = _record(path, file.metadata() or {})
            sums = self.record.get("checksums")
            names = set(file.keys())
            if not isinstance(sums, dict) or set(sums) != names:
                raise _damaged(path, "its list of tensors is not the one it was saved with")
            for name in sorted(names):
                if _digest(file.get_tensor(name)) != sums[name]:
                    raise _damaged(path, f"the checksum of {name} does not fit")

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of the name; memory-mapped."""
        with self._open() as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise BadInput(
                f"{self._path} is not a complete session: it is truncated or not a session "
                "file. Expected a file written by saccade; delete it to start anew."
            ) from error


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
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, "its record cannot be read") from error
    if version != VERSION:
        raise _other_version(path, version)
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(_SUM):
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


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{_DTYPES[tensor.dtype]} {list(tensor.shape)} ".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON header, and the header."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def _remove_stale_parts(path: Path) -> None:
    for part in path.parent.glob(f".{path.name}.*.part"):
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
