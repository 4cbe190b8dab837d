"""Files: written whole or not at all, under names that nobody else has."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .files import DTYPES, bytes_of

_UNFINISHED = ".ziplora.part"  # ends the name of a file that is being written; no loader lists it
_ABANDONED = 3600.0  # seconds
_FORGOTTEN = 7 * 86400.0  # seconds: an empty one is a name that is reserved, by a training of days perhaps
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_reserved: dict[Path, Path] = {}  # names that this process has, and the unfinished file of each
_CANNOT_BE_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def reserve(folder: str | os.PathLike[str], stem: str, number: int, ending: str) -> Path:
    """The first free one of `stem_00001_ending`, `stem_00002_ending`, …, from a number on; nothing is there yet.

    Beside it is an empty unfinished file, which `whole_or_not_at_all` writes to and renames: whoever makes that has the
    name, on this machine or on another one with the same folder, and no loader lists it, whatever becomes of its
    writer. Raises OSError where the folder is missing, read-only or full.
    """
    while True:
        path = Path(folder, f"{stem}_{number:05}_{ending}")
        unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
        with _named(path), contextlib.suppress(FileExistsError):
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if not os.path.lexists(path):  # looked at after: who has just finished it has the name
                _reserved[path] = unfinished
                return path
            os.unlink(unfinished)
        number += 1


def give_back(path: str | os.PathLike[str]) -> None:
    """Let others have a name that was reserved here; nothing where it has been written to."""
    unfinished = _reserved.pop(Path(path), None)
    if unfinished is not None:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


@atexit.register
def _give_all_back() -> None:
    """Of work that the process's end cut short."""
    for path in list(_reserved):
        give_back(path)


@contextlib.contextmanager
def whole_or_not_at_all(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file beside `path` to write to; synced and renamed to `path` after the block, unless it raised.

    Raises OSError where the folder is missing, read-only or full; nothing is left behind then, and a reserved name
    stays reserved. What a process that was killed has left there is cleared away.
    """
    path = Path(path)
    reserved = _reserved.get(path)
    temporary = reserved or path.with_name(f".{path.name}.{secrets.token_hex(6)}{_UNFINISHED}")
    fresh = os.O_EXCL if reserved is None else os.O_TRUNC
    with _named(path):
        # Made with the permissions of any new file: the mask need not be asked for, which only setting it does.
        handle = os.open(temporary, os.O_CREAT | fresh | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(handle, "wb") as file:
                os.utime(temporary)  # now, by the clock of the folder's file system
                _clear(path.parent, os.fstat(handle).st_mtime)
                yield file
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)
            _reserved.pop(path, None)
            _sync(path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary) if reserved is None else os.truncate(temporary, 0)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, one tensor after the other and without a copy of them all.

    (The library's own writer uses names of its own, which nobody clears away, or needs the memory twice.)
    Raises OSError as `whole_or_not_at_all` does.
    """
    with whole_or_not_at_all(path) as file:
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # each at a multiple of its size
        table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key in order:
            tensor, start = tensors[key], end
            end += tensor.numel() * tensor.element_size()
            table[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for key in order:
            file.write(bytes_of(tensors[key].detach().cpu().contiguous()))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What cannot be written is said with its file and folder."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"'{path.name}' could not be written into the folder '{Path(*path.parent.parts[-2:])}' "
            f"({error.strerror or error}); see that it is there, writable and not full, then queue again"
        ) from error


def _clear(folder: Path, now: float) -> None:
    """Delete what was begun here long ago and never finished: its writer is gone.

    now: by the clock of the folder's file system, which need not be this machine's.
    """
    for left in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            status = left.stat()
            if now - status.st_mtime > (_ABANDONED if status.st_size else _FORGOTTEN):
                left.unlink()


def _sync(folder: Path) -> None:
    """The new name too, where a file system knows such a thing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows has no such call
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_BE_SYNCED:
            raise
    finally:
        os.close(handle)
